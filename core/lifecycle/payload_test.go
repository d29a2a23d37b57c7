package lifecycle

import (
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// payloads are those of a task with two secrets and a config.
func payloads(t testing.TB) *Payloads {
	t.Helper()
	task := templateTask(3)
	c := task.Spec.GetContainer()
	c.Env = []string{"MODE={{.Service.Name}}-x", "PLAIN=1"}
	for _, name := range []string{"password", "nested"} {
		c.Secrets = append(c.Secrets, &api.SecretReference{SecretId: name + "-id", SecretName: name, Target: &api.SecretReference_File{File: &api.FileTarget{Name: name}}})
	}
	c.Configs = []*api.ConfigReference{{ConfigId: "conf-id", ConfigName: "conf", Target: &api.ConfigReference_File{File: &api.FileTarget{Name: "/etc/conf"}}}}
	spec, err := Expand(task, templateNode())
	if err != nil {
		t.Fatal(err)
	}
	return NewPayloads(task, spec, templateNode(),
		map[string][]byte{"password-id": []byte("hunter2"), "nested-id": []byte(`{{secret "password"}}`)},
		map[string][]byte{"conf-id": []byte("port=80")})
}

func TestPayloadPlaceholders(t *testing.T) {
	golang := &api.Driver{Name: TemplateDriver}
	for text, want := range map[string]string{
		`{{secret "password"}}`:                          "hunter2",
		`{{config "/etc/conf"}}`:                         "port=80",
		`{{env "MODE"}}`:                                 "web-x", // expanded first
		`{{env "PLAIN"}}`:                                "1",
		`{{secret "nested"}}`:                            `{{secret "password"}}`, // one level
		"{{.Service.Name}} on {{.Node.Hostname}}":        "web on alpha",
		`{{join "," .Task.ID .Node.Platform.OS}}`:        "t1,linux",
		"line\n{{if eq .Task.Slot \"3\"}}third{{end}}\n": "line\nthird\n",
		"nothing to do":                                  "nothing to do",
	} {
		got, err := payloads(t).Expand(golang, []byte(text))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", text, got, err, want)
		}
		if err := CheckPayload(golang, []byte(text)); err != nil {
			t.Errorf("%s is refused: %v", text, err)
		}
		if got, err := payloads(t).Expand(nil, []byte(text)); err != nil || string(got) != text {
			t.Errorf("%s without templating: %q, %v", text, got, err)
		}
	}
}

// TestPayloadFaults has faults, what is said of them, and whether they are seen before there
// is a task.
func TestPayloadFaults(t *testing.T) {
	for text, c := range map[string]struct {
		want  string
		early bool
	}{
		`{{secret "absent"}}`:                 {"secret target absent not found", false},
		`{{config "absent"}}`:                 {"config target absent not found", false},
		`{{env "ABSENT"}}`:                    {"environment variable ABSENT not found", false},
		"{{.Service.Labels.absent}}":          {"map has no entry", false},
		"{{.Nope}}":                           {"can't evaluate field", false},
		"ok\n{{":                              {"line 2", true},
		"{{range 1000000000000}}{{end}}":      {"range is for fields only", true},
		`{{nofunc "x"}}`:                      {"not defined", true},
		`hunter2 {{template "x"}}`:            {"range is for fields only", true},
		`{{printf "%0999999d%0999999d" 1 2}}`: {"expands to more than", false},
	} {
		_, err := payloads(t).Expand(&api.Driver{Name: TemplateDriver}, []byte(text))
		if err == nil || model.KindOf(err) != model.Invalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", text, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error tells the secret: %v", err)
		}
		if err := CheckPayload(&api.Driver{Name: TemplateDriver}, []byte(text)); (err != nil) != c.early {
			t.Errorf("%s before there is a task: %v", text, err)
		}
	}
	for _, err := range []error{
		CheckPayload(&api.Driver{Name: "jinja"}, []byte("x")),
		func() error { _, err := payloads(t).Expand(&api.Driver{Name: "jinja"}, []byte("x")); return err }(),
	} {
		if err == nil || !strings.Contains(err.Error(), `template driver "jinja" is not known: use golang`) {
			t.Errorf("an unknown driver: %v", err)
		}
	}
}

func FuzzPayload(f *testing.F) {
	for _, seed := range []string{"", `{{secret "password"}}`, `{{env "MODE"}}{{config "/etc/conf"}}`, "{{", "{{range 9}}{{end}}", `{{define "x"}}{{end}}`, `{{printf "%09d" 1}}`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		golang := &api.Driver{Name: TemplateDriver}
		out, err := payloads(t).Expand(golang, []byte(text))
		if len(out) > maxExpanded {
			t.Errorf("%d bytes", len(out))
		}
		if early := CheckPayload(golang, []byte(text)); early != nil && err == nil && strings.Contains(text, "{{") {
			t.Errorf("refused early, but it expands: %v", early)
		}
	})
}
