// Containerd-shim-skep-v1 is Skep's containerd shim. containerd starts it; all it does
// is in package worker/runtime/shim. With the first argument "enter" it runs another
// program in a mount namespace of its own instead.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/skep-dev/skep/worker/runtime/shim"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == shim.EnterCommand {
		fmt.Fprintln(os.Stderr, shim.Enter(os.Args[2:]))
		os.Exit(126)
	}
	shim.Run(context.Background())
}
