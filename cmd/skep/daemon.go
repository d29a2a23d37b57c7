package main

import (
	"context"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/cli"
)

func runDaemon(context.Context, cli.Daemon) error {
	return model.Errorf(model.Unimplemented, "this build has no daemon")
}
