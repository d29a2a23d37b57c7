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
var impure = []string{"net", "net/http", "os", "log", "log/slog", "sync", "context", "crypto/rand", "math/rand", "math/rand/v2", "google.golang.org/grpc"}

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
			if slices.Contains(impure, path) {
				t.Errorf("%s: core must not import %s", f.path, path)
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt, *ast.SelectStmt, *ast.ChanType, *ast.SendStmt:
				t.Errorf("%s: core must not use goroutines or channels", f.path)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "NewTimer", "NewTicker"}, n.Sel.Name) {
					t.Errorf("%s: core takes now as an argument, found time.%s", f.path, n.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestPackageComments wants a package comment of at least two sentences everywhere.
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
	for dir, text := range comments {
		if strings.Count(text, ".") < 1 || len(text) < 60 {
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

// TestFuzzTargets wants a fuzz target in every package with a function that parses or
// decodes text or bytes from outside.
func TestFuzzTargets(t *testing.T) {
	parses := map[string]string{}
	fuzzes := map[string]bool{}
	name := regexp.MustCompile(`^(Parse|Decode|parse|decode)[A-Z]`)
	for _, f := range parse(t) {
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if f.test && strings.HasPrefix(fn.Name.Name, "Fuzz") {
				fuzzes[f.dir] = true
			}
			if !f.test && fn.Recv == nil && name.MatchString(fn.Name.Name) && takesBytes(fn) && !strings.HasPrefix(f.dir, "api") {
				parses[f.dir] = fn.Name.Name
			}
		}
	}
	for dir, fn := range parses {
		if !fuzzes[dir] {
			t.Errorf("%s: %s reads foreign input, but the package has no fuzz target", dir, fn)
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

// TestMetricsListed wants every metric name of the source in docs/metrics.md.
func TestMetricsListed(t *testing.T) {
	listed, err := os.ReadFile("docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range parse(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			sel, ok := lit.Type.(*ast.SelectorExpr)
			if !ok || !strings.HasSuffix(sel.Sel.Name, "Opts") {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); !ok || x.Name != "prometheus" {
				return true
			}
			if name := metricName(lit); name != "" && !strings.Contains(string(listed), name) {
				t.Errorf("%s: metric %s is not in docs/metrics.md", f.path, name)
			}
			return true
		})
	}
}

func metricName(lit *ast.CompositeLit) string {
	part := map[string]string{}
	for _, e := range lit.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		key, ok := kv.Key.(*ast.Ident)
		value, isLit := kv.Value.(*ast.BasicLit)
		if ok && isLit {
			part[key.Name] = strings.Trim(value.Value, `"`)
		}
	}
	var names []string
	for _, k := range []string{"Namespace", "Subsystem", "Name"} {
		if part[k] != "" {
			names = append(names, part[k])
		}
	}
	return strings.Join(names, "_")
}
