package ops

import "testing"

func TestTemplates(t *testing.T) {
	for text, ok := range map[string]bool{
		"plain":                            true,
		"{{.Service.Name}}.{{.Task.Slot}}": true,
		"{{range $k, $v := .Service.Labels}}{{$k}}{{end}}":                         true,
		`{{if eq .Node.Platform.OS "linux"}}{{join "," .Node.ID .Task.ID}}{{end}}`: true,
		"{{range 1000000000000}}{{end}}":                                           false,
		"{{$n := 1000000000000}}{{range $n}}{{end}}":                               false,
		`{{with .Service}}{{range 1000000000000}}{{end}}{{end}}`:                   false,
		`{{define "x"}}{{template "x"}}{{end}}{{template "x"}}`:                    false,
		"{{.Nope}}": false,
		"{{":        false,
	} {
		if err := tryExpand(text); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzTemplate(f *testing.F) {
	for _, seed := range []string{"", "{{.Service.ID}}", "{{range .Service.Labels}}{{.}}{{end}}", "{{", "{{range 9}}{{end}}", `{{printf "%09d" 1}}`} {
		f.Add(seed)
	}
	f.Fuzz(func(_ *testing.T, text string) {
		_ = tryExpand(text) // must return, whatever it says
	})
}
