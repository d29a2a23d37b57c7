package ops

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/skep-dev/skep/api"
)

// placeholders is what templates of a container spec may name. The values are empty:
// the trial expansion finds syntax errors and unknown fields when a service is
// created, instead of on every node.
type placeholders struct {
	Service struct {
		ID, Name string
		Labels   map[string]string
	}
	Node struct {
		ID, Hostname string
		Platform     struct{ Architecture, OS string }
	}
	Task struct{ ID, Name, Slot string }
}

// validateTemplates expands every templated field of a container spec for trial.
func validateTemplates(c *api.ContainerSpec) error {
	if err := tryExpand(c.GetHostname()); err != nil {
		return invalid("expanding hostname failed: %v", err)
	}
	for _, env := range c.GetEnv() {
		_, value, _ := strings.Cut(env, "=")
		if err := tryExpand(value); err != nil {
			return invalid("expanding env failed: expanding env %q: %v", env, err)
		}
	}
	for _, m := range c.GetMounts() {
		if err := tryMount(m); err != nil {
			return invalid("expanding mounts failed: %v", err)
		}
	}
	return nil
}

func tryMount(m *api.Mount) error {
	fields := []string{m.GetSource(), m.GetTarget()}
	labels, options := m.GetVolumeOptions().GetLabels(), m.GetVolumeOptions().GetDriverConfig().GetOptions()
	for _, set := range []map[string]string{labels, options} {
		for _, k := range slices.Sorted(maps.Keys(set)) {
			fields = append(fields, set[k])
		}
	}
	for _, f := range fields {
		if err := tryExpand(f); err != nil {
			return fmt.Errorf("expanding mount %q: %w", f, err)
		}
	}
	return nil
}

func tryExpand(text string) error {
	if !strings.Contains(text, "{{") {
		return nil
	}
	functions := template.FuncMap{"join": func(sep string, parts ...string) string { return strings.Join(parts, sep) }}
	t, err := template.New("expansion").Option("missingkey=zero").Funcs(functions).Parse(text)
	if err != nil {
		return err
	}
	if endless(t.Root) {
		return fmt.Errorf("template: expansion: %q: range is for fields only, and templates cannot call templates", text)
	}
	return t.Execute(io.Discard, placeholders{})
}

// endless reports whether a template may keep its reader busy: "range 1000000000000",
// or templates that call themselves.
func endless(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for _, node := range list.Nodes {
		switch n := node.(type) {
		case *parse.TemplateNode:
			return true
		case *parse.RangeNode:
			if len(n.Pipe.Cmds) != 1 || len(n.Pipe.Cmds[0].Args) != 1 || n.Pipe.Cmds[0].Args[0].Type() != parse.NodeField ||
				endless(n.List) || endless(n.ElseList) {
				return true
			}
		case *parse.IfNode:
			if endless(n.List) || endless(n.ElseList) {
				return true
			}
		case *parse.WithNode:
			if endless(n.List) || endless(n.ElseList) {
				return true
			}
		}
	}
	return false
}
