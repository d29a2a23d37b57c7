// Package skep holds the repository's test of itself; the program is cmd/skep.
package skep

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/skep-dev/skep/"

// forbidden lists, for packages below a directory, what they may not import. The longest
// matching directory decides. It is the tree of ARCHITECTURE.md as a table.
var forbidden = map[string][]string{
	"core":                {"control", "worker", "platform", "edge", "node", "cmd"},
	"platform":            {"control", "worker", "edge", "node", "cmd"},
	"control":             {"worker", "edge", "node", "cmd"},
	"worker":              {"control", "edge", "node", "cmd"},
	"edge/cli":            {"control", "worker", "node", "cmd", "edge/dockerapi"},
	"edge/dockerapi":      {"node", "cmd", "edge/cli", "worker/agent", "worker/dataplane"},
	"node":                {"edge/cli", "cmd"},
	"control/replica":     {"worker", "edge", "node", "cmd", "control/manager", "control/ops", "control/dispatcher", "control/ca", "control/logbroker"},
	"control/ops":         {"worker", "edge", "node", "cmd", "control/dispatcher", "control/ca", "control/logbroker"},
	"core/model":          {"control", "worker", "platform", "edge", "node", "cmd", "core/"},
	"core/store":          {"control", "worker", "platform", "edge", "node", "cmd", "core/orch", "core/sched", "core/alloc", "core/lifecycle", "core/pki"},
	"worker/runtime":      {"control", "edge", "node", "cmd", "worker/agent", "worker/dataplane"},
	"worker/dataplane":    {"control", "edge", "node", "cmd", "worker/agent"},
	"platform/wire":       {"control", "worker", "edge", "node", "cmd"},
	"cmd/containerd-shim": {"control", "edge", "node", "core"},
}

// impure is what core must not import: it decides, and never blocks, waits or asks.
var impure = []string{
	"net", "os", "syscall", "log", "sync", "context", "crypto/rand", "math/rand", "unsafe", "runtime", "plugin", "database/sql",
	"io/ioutil", "embed", "flag", "google.golang.org/grpc", "golang.org/x/sys", "golang.org/x/net",
}

// isImpure reports whether an import is on that list, or below an entry of it.
func isImpure(path string) bool {
	return path != "net/netip" && slices.ContainsFunc(impure, func(bad string) bool {
		return path == bad || strings.HasPrefix(path, bad+"/")
	})
}

type file struct {
	dir  string // slash-separated, relative to the root
	path string
	ast  *ast.File
	test bool
}

func parse(t *testing.T) []file {
	t.Helper()
	var files []file
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); name == "bin" || name == "testdata" || name == "tools" || strings.HasPrefix(name, ".") && name != "." {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		files = append(files, file{dir: filepath.ToSlash(filepath.Dir(path)), path: path, ast: f, test: strings.HasSuffix(path, "_test.go")})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func imports(f file) []string {
	var out []string
	for _, i := range f.ast.Imports {
		out = append(out, strings.Trim(i.Path.Value, `"`))
	}
	return out
}

// TestImports holds the import table.
func TestImports(t *testing.T) {
	for _, f := range parse(t) {
		if f.test {
			continue
		}
		var rule string
		for dir := range forbidden {
			if (f.dir == dir || strings.HasPrefix(f.dir, dir+"/") || dir == "cmd/containerd-shim" && strings.HasPrefix(f.dir, dir)) && len(dir) > len(rule) {
				rule = dir
			}
		}
		for _, path := range imports(f) {
			if path == "testing" && f.dir != "sim" && !strings.HasPrefix(f.dir, "sim/") {
				t.Errorf("%s: shipped code must not import testing", f.path)
			}
			local, ok := strings.CutPrefix(path, module)
			if !ok || local == f.dir {
				continue
			}
			for _, bad := range forbidden[rule] {
				if (local == strings.TrimSuffix(bad, "/") || strings.HasPrefix(local, strings.TrimSuffix(bad, "/")+"/")) && !strings.HasPrefix(local, rule+"/") {
					t.Errorf("%s: %s must not import %s", f.path, rule, local)
				}
			}
		}
	}
}

// TestCoreIsPure holds core to values in, values out.
func TestCoreIsPure(t *testing.T) {
	for _, f := range parse(t) {
		if f.test || !strings.HasPrefix(f.dir, "core/") {
			continue
		}
		for _, path := range imports(f) {
			if isImpure(path) {
				t.Errorf("%s: core must not import %s", f.path, path)
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt, *ast.SelectStmt, *ast.ChanType, *ast.SendStmt:
				t.Errorf("%s: core must not use goroutines or channels", f.path)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, n.Sel.Name) {
					t.Errorf("%s: core takes now as an argument, found time.%s", f.path, n.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestPackageComments wants a package comment of at least two sentences everywhere; one
// does for a command.
func TestPackageComments(t *testing.T) {
	comments := map[string]string{}
	for _, f := range parse(t) {
		if f.test || f.dir == "." || strings.HasPrefix(f.dir, "api") {
			continue
		}
		if f.ast.Doc != nil {
			comments[f.dir] += f.ast.Doc.Text()
		} else if _, ok := comments[f.dir]; !ok {
			comments[f.dir] = ""
		}
	}
	sentence := regexp.MustCompile(`[.:;](\s|$)`)
	for dir, text := range comments {
		if len(sentence.FindAllString(text, -1)) < 2 && !strings.HasPrefix(text, "Command ") || len(text) < 100 {
			t.Errorf("%s: the package comment must say what the package does, who owns its state and what it leaves to others", dir)
		}
	}
}

// TestTodo wants an issue behind every TODO.
func TestTodo(t *testing.T) {
	todo := regexp.MustCompile(`\b(TODO|FIXME|XXX)\b`)
	numbered := regexp.MustCompile(`TODO\(#\d+\)`)
	for _, f := range parse(t) {
		if f.path == "tidy_test.go" || strings.HasSuffix(f.path, ".pb.go") {
			continue
		}
		for _, group := range f.ast.Comments {
			for _, c := range group.List {
				if todo.MatchString(c.Text) && !numbered.MatchString(c.Text) {
					t.Errorf("%s: %s: write TODO(#issue) or do it", f.path, c.Text)
				}
			}
		}
	}
}

// TestFuzzTargets wants every function that parses or decodes text or bytes from outside to
// be reached by a fuzz target of its package: named in the target, or in a function of the
// package that the target reaches.
func TestFuzzTargets(t *testing.T) {
	type function struct{ dir, name string }
	calls := make(map[function][]string) // what a function mentions
	var parsers, reached []function
	name := regexp.MustCompile(`^(Parse|Decode|parse|decode)[A-Z]`)
	for _, f := range parse(t) {
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			key := function{f.dir, fn.Name.Name}
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				if id, ok := n.(*ast.Ident); ok {
					calls[key] = append(calls[key], id.Name)
				}
				return true
			})
			if f.test && strings.HasPrefix(fn.Name.Name, "Fuzz") {
				reached = append(reached, key)
			}
			if !f.test && name.MatchString(fn.Name.Name) && takesBytes(fn) && !strings.HasPrefix(f.dir, "api") {
				parsers = append(parsers, key)
			}
		}
	}
	seen := make(map[function]bool)
	for len(reached) > 0 {
		at := reached[0]
		reached = reached[1:]
		if seen[at] {
			continue
		}
		seen[at] = true
		for _, called := range calls[at] {
			reached = append(reached, function{at.dir, called})
		}
	}
	for _, p := range parsers {
		if !seen[p] {
			t.Errorf("%s: %s reads foreign input, but no fuzz target of the package reaches it", p.dir, p.name)
		}
	}
}

// takesBytes reports whether the first parameter is a string or byte slice.
func takesBytes(fn *ast.FuncDecl) bool {
	if fn.Type.Params.NumFields() == 0 {
		return false
	}
	switch p := fn.Type.Params.List[0].Type.(type) {
	case *ast.Ident:
		return p.Name == "string"
	case *ast.ArrayType:
		id, ok := p.Elt.(*ast.Ident)
		return ok && id.Name == "byte"
	default:
		return false
	}
}

// TestPackageNames wants nouns that say something.
func TestPackageNames(t *testing.T) {
	for _, f := range parse(t) {
		switch name := strings.TrimSuffix(f.ast.Name.Name, "_test"); name {
		case "util", "utils", "common", "helper", "helpers", "type", "types", "base", "misc", "shared", "lib", "pkg", "internal":
			t.Errorf("%s: package %s could hold anything: name it after what it does", f.path, name)
		}
	}
}

// TestMetricsListed wants every metric of the source in the table of docs/metrics.md, and
// nothing else there.
func TestMetricsListed(t *testing.T) {
	text, err := os.ReadFile("docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		if listed[row[1]] {
			t.Errorf("docs/metrics.md: %s is listed twice", row[1])
		}
		listed[row[1]] = true
	}
	// Namespace, subsystem and what is measured: two words are a label's name, as swarm_id.
	name := regexp.MustCompile(`^(skep|swarm|engine)_[a-z0-9]+_[a-z0-9_]+$`)
	found := make(map[string]bool)
	for _, f := range parse(t) {
		if f.test || !slices.Contains(imports(f), "github.com/prometheus/client_golang/prometheus") {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				if text := strings.Trim(n.Value, `"`); name.MatchString(text) && !found[text] {
					found[text] = true
					if !listed[text] {
						t.Errorf("%s: metric %s is not in docs/metrics.md", f.path, text)
					}
				}
			case *ast.CompositeLit:
				if metric, ok := metricName(n); ok && !name.MatchString(metric) {
					t.Errorf("%s: write the name of metric %q whole, as one literal", f.path, metric)
				}
			}
			return true
		})
	}
	for metric := range listed {
		if !found[metric] {
			t.Errorf("docs/metrics.md: nothing makes %s", metric)
		}
	}
}

// metricName returns the Name of a literal of options of a metric.
func metricName(lit *ast.CompositeLit) (string, bool) {
	sel, ok := lit.Type.(*ast.SelectorExpr)
	if !ok || !strings.HasSuffix(sel.Sel.Name, "Opts") {
		return "", false
	}
	if x, ok := sel.X.(*ast.Ident); !ok || x.Name != "prometheus" {
		return "", false
	}
	for _, e := range lit.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		key, ok := kv.Key.(*ast.Ident)
		value, isLit := kv.Value.(*ast.BasicLit)
		if ok && isLit && key.Name == "Name" {
			return strings.Trim(value.Value, `"`), true
		}
	}
	return "", true
}
