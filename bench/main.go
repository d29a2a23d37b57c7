// Command bench measures what Skep promises and prints a table; the rows also go to
// bench/results as JSON. It needs root and the binaries of `make build`; Debian's Docker
// Engine is fetched for the comparison. Figures depend on the machine and its load, so
// rows that compare run both sides alternately and print ratios.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// row is one line of the table.
type row struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
	Detail string  `json:"detail"`
	// Wanted is the figure aimed at, as text.
	Wanted string `json:"wanted"`
}

// bench is one run of the program.
type bench struct {
	bin string
	// against holds another version's binaries; may be empty.
	against string
	work    string
	pairs   int
	rounds  int
	// nodes are the numbers of simulated nodes, separated by commas.
	nodes string
	// rotating are those that the root is rotated with.
	rotating string
	rows     []row
	// started counts engines; each has a directory of its own.
	started int
	// engines are measured alternately by start.
	engines []string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	b := &bench{}
	only := flag.String("only", "idle,unlock,seal,start,leader,worker,scale,network,netchange,endpoints,fanout,fanleader,encryption,ca,reads", "comma-separated parts to run")
	flag.StringVar(&b.bin, "bin", "bin", "directory of the built binaries")
	flag.StringVar(&b.against, "against", "", "directory of another version's binaries, which reads measures too")
	flag.IntVar(&b.pairs, "pairs", 5, "pairs of Skep and Docker Engine runs")
	flag.IntVar(&b.rounds, "rounds", 20, "rounds of killing the leader; half as many for workers")
	engines := flag.String("engines", "skep,docker", "what start measures")
	flag.StringVar(&b.nodes, "nodes", "1000,5000", "numbers of simulated nodes that scale runs with")
	flag.StringVar(&b.rotating, "rotating", "5,100,1000", "numbers of simulated nodes that ca rotates the root with")
	manage := flag.String("scale-manager", "", "for scale itself: be the manager whose files lie in this directory")
	out := flag.String("out", "bench/results", "directory for the results")
	profile := flag.String("profile", "", "file for a profile of this process's processor time")
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return errors.Join(err, f.Close())
		}
		defer func() { pprof.StopCPUProfile(); _ = f.Close() }()
	}
	if *manage != "" {
		return runScaleManager(ctx, *manage)
	}
	b.engines = strings.Split(*engines, ",")
	var err error
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	if b.work, err = os.MkdirTemp("", "skb"); err != nil {
		return err
	}
	defer os.RemoveAll(b.work)
	parts := []struct {
		name string
		run  func(context.Context) error
	}{
		{"idle", b.idle},
		{"unlock", b.unlock},
		{"seal", b.seal},
		{"start", b.start},
		{"leader", b.leader},
		{"worker", b.worker},
		{"scale", b.scale},
		{"network", b.network},
		{"netchange", b.netchange},
		{"endpoints", b.tenThousand},
		{"fanout", b.fanOut},
		{"fanleader", b.fanLeader},
		{"encryption", b.encryption},
		{"ca", b.authority},
		{"reads", b.reads},
	}
	var failed []error
	for _, p := range parts {
		if !slices.Contains(strings.Split(*only, ","), p.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "== %s\n", p.name)
		if err := p.run(ctx); err != nil { // the others' figures are still worth having
			failed = append(failed, fmt.Errorf("%s: %w", p.name, err))
		}
	}
	b.print()
	return errors.Join(append(failed, b.save(*out))...)
}

func (b *bench) add(r row) { b.rows = append(b.rows, r) }

func (b *bench) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "measure\tvalue\tunit\twanted\tdetail")
	for _, r := range b.rows {
		fmt.Fprintf(w, "%s\t%.3g\t%s\t%s\t%s\n", r.Name, r.Value, r.Unit, r.Wanted, r.Detail)
	}
	_ = w.Flush()
}

func (b *bench) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(b.rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, time.Now().UTC().Format("20060102-150405")+".json"), append(data, '\n'), 0o644)
}

// quantile returns the q-quantile of values (nearest rank).
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// spread describes values for the detail column.
func spread(values []float64) string {
	return fmt.Sprintf("n=%d min %.3g median %.3g max %.3g", len(values), slices.Min(values), quantile(values, 0.5), slices.Max(values))
}
