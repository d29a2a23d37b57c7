package jsonlog_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/skep-dev/skep/worker/runtime/jsonlog"
)

func TestAttributes(t *testing.T) {
	from := jsonlog.Source{
		Labels: map[string]string{"com.example.team": "core", "tier": "front"},
		Env:    []string{"STAGE=prod", "EMPTY=", "SECRET_KEY=x", "odd"},
		ID:     strings.Repeat("0123456789", 6) + "abcd", Name: "web", ImageID: "sha256:" + strings.Repeat("f", 64), ImageName: "web:1", DaemonName: "skep",
	}
	for _, c := range []struct {
		name    string
		options map[string]string
		want    map[string]string
		err     string
	}{
		{name: "nothing asked"},
		{name: "names of nothing", options: map[string]string{"labels": "a,b", "env": "odd"}},
		{name: "labels", options: map[string]string{"labels": "tier,nope"}, want: map[string]string{"tier": "front"}},
		{name: "labels by pattern", options: map[string]string{"labels-regex": `^com\.`}, want: map[string]string{"com.example.team": "core"}},
		{name: "env", options: map[string]string{"env": "STAGE,EMPTY"}, want: map[string]string{"STAGE": "prod", "EMPTY": ""}},
		{name: "env by pattern", options: map[string]string{"env-regex": "^S", "labels": "tier"}, want: map[string]string{"STAGE": "prod", "SECRET_KEY": "x", "tier": "front"}},
		{name: "tag", options: map[string]string{"tag": "{{.Name}}/{{.ID}}/{{.ImageName}}/{{.DaemonName}}"}, want: map[string]string{"tag": "web/012345678901/web:1/skep"}},
		{name: "tag of ids", options: map[string]string{"tag": "{{.ImageID}} {{upper .ContainerName}} {{index .ContainerLabels \"tier\"}}"}, want: map[string]string{"tag": "ffffffffffff /WEB front"}},
		{name: "tag with functions", options: map[string]string{"tag": `{{join (split .ImageName ":") "-"}}{{pad .Name 1 0}}{{truncate .FullID 2}}`}, want: map[string]string{"tag": "web-1 web01"}},
		{name: "bad pattern", options: map[string]string{"env-regex": "("}, err: "env-regex"},
		{name: "bad template", options: map[string]string{"tag": "{{.Nope}}"}, err: "tag"},
		{name: "too much", options: map[string]string{"tag": `{{pad .Name 20000 0}}`}, err: "bytes to every line"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := jsonlog.Attributes(c.options, from)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got error %v, want one about %q", err, c.err)
				}
				return
			}
			if d := cmp.Diff(c.want, got); d != "" || err != nil {
				t.Errorf("%v\n%s", err, d)
			}
		})
	}
}

func TestEntriesCarryTheLogsAttributes(t *testing.T) {
	path := t.TempDir() + "/log"
	attrs := map[string]string{"k": "a\"b", "a": ""}
	w, err := jsonlog.Open(jsonlog.Config{Path: path, Attrs: attrs})
	if err != nil {
		t.Fatal(err)
	}
	write(t, w, 0, 2)
	n := 0
	if err := jsonlog.Read(t.Context(), path, jsonlog.Options{Tail: -1}, func(e jsonlog.Entry) error {
		n++
		if d := cmp.Diff(attrs, e.Attrs); d != "" {
			t.Error(d)
		}
		return nil
	}); err != nil || n != 2 {
		t.Errorf("%d entries, %v", n, err)
	}
}
