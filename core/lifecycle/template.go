package lifecycle

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// TemplateNode is what templates may say about the node.
type TemplateNode struct {
	ID, Hostname string
	Platform     struct{ Architecture, OS string }
}

// templateData is the dot of a template.
type templateData struct {
	Service struct {
		ID, Name string
		Labels   map[string]string
	}
	Node TemplateNode
	Task struct{ ID, Name, Slot string }
}

// maxExpanded bounds the text that one template can grow to.
const maxExpanded = 1 << 20

// limited is a writer that refuses more than maxExpanded bytes.
type limited struct{ strings.Builder }

// Write appends p or fails.
func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxExpanded {
		return 0, fmt.Errorf("template expands to more than %d bytes", maxExpanded)
	}
	return l.Builder.Write(p)
}

// parseTemplate reads a template that may call more functions than the common ones.
func parseTemplate(text string, more template.FuncMap) (*template.Template, error) {
	t, err := template.New("expansion").Option("missingkey=error").Funcs(template.FuncMap{
		"join": func(sep string, parts ...string) string { return strings.Join(parts, sep) },
	}).Funcs(more).Parse(text)
	if err != nil {
		return nil, err
	}
	if endless(t.Root) {
		return nil, errEndless
	}
	return t, nil
}

var errEndless = errors.New("template: expansion: range is for fields only, and templates cannot call templates")

func expandWith(text string, data templateData, more template.FuncMap) (string, error) {
	if !strings.Contains(text, "{{") {
		return text, nil
	}
	t, err := parseTemplate(text, more)
	if err != nil {
		return "", err
	}
	return execute(t, data)
}

func execute(t *template.Template, data templateData) (string, error) {
	var out limited
	if err := t.Execute(&out, data); err != nil {
		return "", err
	}
	return out.String(), nil
}

// endless reports whether a template may keep its reader busy: "range 1000000000000", or
// templates that call themselves.
func endless(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	return slices.ContainsFunc(list.Nodes, func(node parse.Node) bool {
		switch n := node.(type) {
		case *parse.TemplateNode:
			return true
		case *parse.RangeNode:
			return len(n.Pipe.Cmds) != 1 || len(n.Pipe.Cmds[0].Args) != 1 || n.Pipe.Cmds[0].Args[0].Type() != parse.NodeField ||
				endless(n.List) || endless(n.ElseList)
		case *parse.IfNode:
			return endless(n.List) || endless(n.ElseList)
		case *parse.WithNode:
			return endless(n.List) || endless(n.ElseList)
		default:
			return false
		}
	})
}

// dataOf returns the dot of a task's templates.
func dataOf(task *api.Task, node TemplateNode) templateData {
	var data templateData
	data.Service.ID, data.Service.Name = task.GetServiceId(), task.GetServiceAnnotations().GetName()
	data.Service.Labels = task.GetServiceAnnotations().GetLabels()
	data.Node = node
	data.Task.ID, data.Task.Name, data.Task.Slot = task.GetId(), model.TaskName(task), node.ID
	if task.GetSlot() != 0 {
		data.Task.Slot = fmt.Sprint(task.GetSlot())
	}
	return data
}

// Expand returns the container spec of a task with the templates in its environment,
// mounts and host name expanded. The task is not changed.
func Expand(task *api.Task, node TemplateNode) (*api.ContainerSpec, error) {
	data := dataOf(task, node)
	spec := proto.CloneOf(task.GetSpec().GetContainer())
	if spec == nil {
		return nil, fmt.Errorf("task %s has no container spec", task.GetId())
	}
	err := eachTemplate(spec, func(text string) (string, error) { return expandWith(text, data, nil) })
	if err != nil {
		return nil, err
	}
	return spec, nil
}

// CheckTemplates tries the templates in a container spec, with empty values: it finds syntax
// errors and unknown fields when a service is created, instead of on every node.
func CheckTemplates(spec *api.ContainerSpec) error {
	return eachTemplate(proto.CloneOf(spec), func(text string) (string, error) {
		if !strings.Contains(text, "{{") {
			return text, nil
		}
		t, err := parseTemplate(text, nil)
		if err != nil {
			return "", err
		}
		return execute(t.Option("missingkey=zero"), templateData{}) // the service may have the label
	})
}

// eachTemplate replaces every text of a container spec that may be a template by what f
// makes of it.
func eachTemplate(spec *api.ContainerSpec, f func(string) (string, error)) error {
	for i, env := range spec.GetEnv() {
		name, value, ok := strings.Cut(env, "=")
		if !ok {
			continue
		}
		expanded, err := f(value)
		if err != nil {
			return fmt.Errorf("expanding env failed: expanding env %q: %w", env, err)
		}
		spec.Env[i] = name + "=" + expanded
	}
	if spec.GetHostname() != "" {
		expanded, err := f(spec.GetHostname())
		if err != nil {
			return fmt.Errorf("expanding hostname failed: %w", err)
		}
		spec.Hostname = expanded
	}
	for _, mount := range spec.GetMounts() {
		if err := eachMountTemplate(mount, f); err != nil {
			return fmt.Errorf("expanding mounts failed: %w", err)
		}
	}
	return nil
}

func eachMountTemplate(mount *api.Mount, f func(string) (string, error)) error {
	source, err := f(mount.GetSource())
	if err != nil {
		return fmt.Errorf("expanding mount source %q: %w", mount.GetSource(), err)
	}
	target, err := f(mount.GetTarget())
	if err != nil {
		return fmt.Errorf("expanding mount target %q: %w", mount.GetTarget(), err)
	}
	mount.Source, mount.Target = source, target
	for _, m := range []map[string]string{mount.GetVolumeOptions().GetLabels(), mount.GetVolumeOptions().GetDriverConfig().GetOptions()} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if m[k], err = f(m[k]); err != nil {
				return fmt.Errorf("expanding volume option %q: %w", k, err)
			}
		}
	}
	return nil
}
