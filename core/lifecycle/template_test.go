package lifecycle

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

func templateTask(slot uint64) *api.Task {
	return &api.Task{
		Id: "t1", ServiceId: "s1", NodeId: "n1", Slot: slot,
		ServiceAnnotations: &api.Annotations{Name: "web", Labels: map[string]string{"tier": "front", "a.b/c": "odd"}},
		Spec:               &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{}}},
	}
}

func templateNode() TemplateNode {
	n := TemplateNode{ID: "n1", Hostname: "alpha"}
	n.Platform.OS, n.Platform.Architecture = "linux", "x86_64"
	return n
}

// TestPlaceholders has every documented placeholder, in an environment variable.
func TestPlaceholders(t *testing.T) {
	for text, want := range map[string]string{
		"{{.Service.ID}}":                       "s1",
		"{{.Service.Name}}":                     "web",
		"{{.Service.Labels.tier}}":              "front",
		`{{index .Service.Labels "a.b/c"}}`:     "odd",
		"{{.Node.ID}}":                          "n1",
		"{{.Node.Hostname}}":                    "alpha",
		"{{.Node.Platform.OS}}":                 "linux",
		"{{.Node.Platform.Architecture}}":       "x86_64",
		"{{.Task.ID}}":                          "t1",
		"{{.Task.Name}}":                        "web.3.t1",
		"{{.Task.Slot}}":                        "3",
		`{{join "-" .Service.Name .Task.Slot}}`: "web-3",
		"plain":                                 "plain",
		"{ {.Task.ID} }":                        "{ {.Task.ID} }",
		"a={{.Task.ID}}=b":                      "a=t1=b",
		"":                                      "",
	} {
		task := templateTask(3)
		task.Spec.GetContainer().Env = []string{"X=" + text}
		got, err := Expand(task, templateNode())
		if err != nil || got.GetEnv()[0] != "X="+want {
			t.Errorf("%s: %v, %v, want %s", text, got.GetEnv(), err, want)
		}
	}
	global := templateTask(0)
	global.Spec.GetContainer().Env = []string{"X={{.Task.Slot}}", "Y={{.Task.Name}}"}
	got, err := Expand(global, templateNode())
	if err != nil || got.GetEnv()[0] != "X=n1" || got.GetEnv()[1] != "Y=web.n1.t1" {
		t.Errorf("global: %v, %v", got.GetEnv(), err)
	}
}

// TestExpandedFields has every field that is expanded, and some that are not.
func TestExpandedFields(t *testing.T) {
	task := templateTask(3)
	const name = "{{.Service.Name}}"
	*task.Spec.GetContainer() = api.ContainerSpec{
		Hostname: name + "-{{.Task.Slot}}", Env: []string{"A=" + name, name}, Command: []string{name}, Labels: map[string]string{"l": name},
		Mounts: []*api.Mount{{Source: name, Target: "/" + name, VolumeOptions: &api.Mount_VolumeOptions{
			Labels: map[string]string{"l": name}, DriverConfig: &api.Driver{Name: name, Options: map[string]string{"o": name}},
		}}},
	}
	before := proto.CloneOf(task)
	got, err := Expand(task, templateNode())
	if err != nil {
		t.Fatal(err)
	}
	want := &api.ContainerSpec{
		Hostname: "web-3", Env: []string{"A=web", name}, Command: []string{name}, Labels: map[string]string{"l": name},
		Mounts: []*api.Mount{{Source: "web", Target: "/web", VolumeOptions: &api.Mount_VolumeOptions{
			Labels: map[string]string{"l": "web"}, DriverConfig: &api.Driver{Name: name, Options: map[string]string{"o": "web"}},
		}}},
	}
	if !proto.Equal(want, got) {
		t.Errorf("expanded:\n%v\nwant:\n%v", got, want)
	}
	if !proto.Equal(before, task) {
		t.Error("the task itself changed")
	}
}

// TestTemplateErrors wants errors that name the field and what is wrong in it.
func TestTemplateErrors(t *testing.T) {
	volume := func(o *api.Mount_VolumeOptions) *api.ContainerSpec {
		return &api.ContainerSpec{Mounts: []*api.Mount{{Type: api.Mount_VOLUME, VolumeOptions: o}}}
	}
	for _, c := range []struct {
		spec *api.ContainerSpec
		want []string
	}{
		{&api.ContainerSpec{Env: []string{"A={{"}}, []string{`expanding env failed: expanding env "A={{": template: expansion:1:`}},
		{&api.ContainerSpec{Env: []string{"A={{.Foo}}"}}, []string{"expanding env failed", "Foo"}},
		{&api.ContainerSpec{Env: []string{"A={{.Service.Labels.missing}}"}}, []string{"expanding env failed", `no entry for key "missing"`}},
		{&api.ContainerSpec{Env: []string{"A={{env `HOME`}}"}}, []string{"expanding env failed", `function "env" not defined`}},
		{&api.ContainerSpec{Env: []string{`A={{secret "x"}}`}}, []string{"expanding env failed", `function "secret" not defined`}},
		{&api.ContainerSpec{Env: []string{"A={{range $i := .Service.Name}}"}}, []string{"expanding env failed"}},
		{&api.ContainerSpec{Env: []string{`A={{printf "%1048577s" "x"}}`}}, []string{"expanding env failed", "more than 1048576 bytes"}},
		{&api.ContainerSpec{Env: []string{"A={{range 1000000000000}}{{end}}"}}, []string{"range is for fields only"}},
		{&api.ContainerSpec{Env: []string{"A={{$n := 1000000000000}}{{with .Node}}{{range $n}}{{end}}{{end}}"}}, []string{"range is for fields only"}},
		{&api.ContainerSpec{Env: []string{"A={{if .Node.ID}}{{else}}{{range 1000000000000}}{{end}}{{end}}"}}, []string{"range is for fields only"}},
		{&api.ContainerSpec{Env: []string{`A={{define "x"}}{{template "x"}}{{end}}{{template "x"}}`}}, []string{"templates cannot call templates"}},
		{&api.ContainerSpec{Hostname: "{{.Node}"}, []string{"expanding hostname failed: template: expansion:1:"}},
		{&api.ContainerSpec{Mounts: []*api.Mount{{Source: "{{.X}}"}}}, []string{`expanding mounts failed: expanding mount source "{{.X}}": `}},
		{&api.ContainerSpec{Mounts: []*api.Mount{{Target: "{{.X}}"}}}, []string{"expanding mounts failed: expanding mount target", "X"}},
		{volume(&api.Mount_VolumeOptions{Labels: map[string]string{"l": "{{.X}}"}}), []string{"expanding mounts failed", `"l"`, "X"}},
		{volume(&api.Mount_VolumeOptions{DriverConfig: &api.Driver{Options: map[string]string{"o": "{{.X}}"}}}), []string{"expanding mounts failed", `"o"`, "X"}},
	} {
		task := templateTask(1)
		task.Spec.Runtime = &api.TaskSpec_Container{Container: c.spec}
		_, err := Expand(task, templateNode())
		if err == nil {
			t.Errorf("%v is accepted", c.spec)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%v, want %q", err, part)
			}
		}
	}
	if _, err := Expand(&api.Task{Id: "t1"}, templateNode()); err == nil || !strings.Contains(err.Error(), "t1") {
		t.Errorf("no container: %v", err)
	}
}

// TestCheckTemplates tries templates as a service is created, before there is a task.
func TestCheckTemplates(t *testing.T) {
	for text, ok := range map[string]bool{
		"plain":                            true,
		"{{.Service.Name}}.{{.Task.Slot}}": true,
		"{{range $k, $v := .Service.Labels}}{{$k}}{{end}}":                         true,
		`{{if eq .Node.Platform.OS "linux"}}{{join "," .Node.ID .Task.ID}}{{end}}`: true,
		"{{.Service.Labels.later}}":                                                true,
		"{{range 1000000000000}}{{end}}":                                           false,
		"{{$n := 1000000000000}}{{range $n}}{{end}}":                               false,
		`{{with .Service}}{{range 1000000000000}}{{end}}{{end}}`:                   false,
		`{{define "x"}}{{template "x"}}{{end}}{{template "x"}}`:                    false,
		`{{printf "%1048577s" "x"}}`:                                               false,
		"{{.Nope}}":                                                                false,
		"{{":                                                                       false,
	} {
		spec := &api.ContainerSpec{Env: []string{"A=" + text}}
		if err := CheckTemplates(spec); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
		if spec.GetEnv()[0] != "A="+text {
			t.Errorf("%s: the spec itself changed", text)
		}
	}
}

// FuzzExpand expands anything, within bounds, twice the same.
func FuzzExpand(f *testing.F) {
	for _, seed := range []string{
		"{{.Service.Name}}", "{{.Task.Slot}}-{{.Node.Hostname}}", `{{join "," .Task.ID .Node.ID}}`, "{{", "{{.X}}", `{{printf "%9999999s" "x"}}`,
		`{{range $k, $v := .Service.Labels}}{{$k}}{{end}}`, `{{range 1000000000000}}{{end}}`, `{{define "a"}}{{template "a" .}}{{end}}{{template "a" .}}`, `{{with .Task}}{{.ID}}{{end}}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		task := templateTask(3)
		task.Spec.GetContainer().Hostname = text
		_ = CheckTemplates(task.GetSpec().GetContainer()) // must return, whatever it says
		got, err := Expand(task, templateNode())
		if err != nil {
			if !strings.HasPrefix(err.Error(), "expanding hostname failed: ") {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if len(got.GetHostname()) > max(maxExpanded, len(text)) {
			t.Errorf("%q grows to %d bytes", text, len(got.GetHostname()))
		}
		again, err := Expand(task, templateNode())
		if err != nil || again.GetHostname() != got.GetHostname() && !strings.Contains(text, "{{") {
			t.Errorf("%q expands to %q and then %q, %v", text, got.GetHostname(), again.GetHostname(), err)
		}
	})
}
