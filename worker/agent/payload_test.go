package agent

import (
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// TestDependencies has what a task is given of secrets and configs: expanded, its own value
// of a driver's secret, and nothing beyond the limits.
func TestDependencies(t *testing.T) {
	golang := &api.Driver{Name: "golang"}
	secret := func(id, data string, templating *api.Driver) *api.Secret {
		return &api.Secret{Id: id, Spec: &api.SecretSpec{Data: []byte(data), Templating: templating}}
	}
	w := &worker{cfg: &Config{NodeID: "n1", Hostname: "alpha"}, complete: true, secrets: map[string]*api.Secret{
		"plain": secret("plain", "{{.Task.ID}}", nil), "made": secret("made", "{{.Node.Hostname}} {{.Node.Platform.OS}}", golang),
		"driven": secret("driven", "for all", nil), "driven.t": secret("driven.t", "for t", nil),
		"large": secret("large", strings.Repeat(`{{config "c"}}`, 2), golang),
	}, configs: map[string]*api.Config{
		"conf": {Id: "conf", Spec: &api.ConfigSpec{Data: []byte(`{{secret "made"}}`), Templating: golang}},
		"half": {Id: "half", Spec: &api.ConfigSpec{Data: make([]byte, 300_000)}},
	}}
	depend := func(taskID string, secrets, configs []string) (map[string][]byte, map[string][]byte, error) {
		one := task(taskID, api.TaskState_RUNNING)
		c := one.GetSpec().GetContainer()
		for _, id := range secrets {
			c.Secrets = append(c.Secrets, &api.SecretReference{SecretId: id, SecretName: id, Target: &api.SecretReference_File{File: &api.FileTarget{Name: id}}})
		}
		for _, id := range configs {
			c.Configs = append(c.Configs, &api.ConfigReference{ConfigId: id, ConfigName: id, Target: &api.ConfigReference_File{File: &api.FileTarget{Name: "c"}}})
		}
		return w.dependencies(one, c, w.templateNode())
	}
	s, c, err := depend("t", []string{"plain", "made", "driven"}, []string{"conf"})
	if err != nil || string(s["plain"]) != "{{.Task.ID}}" || string(s["made"]) != "alpha linux" || string(s["driven"]) != "for t" {
		t.Errorf("secrets %q, %v", s, err)
	}
	if string(c["conf"]) != "{{.Node.Hostname}} {{.Node.Platform.OS}}" {
		t.Errorf("configs %q", c)
	}
	if s, _, err := depend("other", []string{"driven"}, nil); err != nil || string(s["driven"]) != "for all" {
		t.Errorf("another task: %q, %v", s, err)
	}
	for _, f := range []struct {
		secrets, configs []string
		want             string
		kind             model.Kind
	}{
		{[]string{"absent"}, nil, "secret absent is not available on this node", model.Internal},
		{nil, []string{"absent"}, "config absent is not available on this node", model.Internal},
		{nil, []string{"conf"}, "expand config conf: template, line 1: secret target made not found", model.Invalid},
		{[]string{"large"}, []string{"half"}, "expand secret large: it expands to 600000 bytes, more than the 511999 of a secret", model.Invalid},
	} {
		if _, _, err := depend("t", f.secrets, f.configs); err == nil || err.Error() != f.want || model.KindOf(err) != f.kind {
			t.Errorf("%v %v: %v", f.secrets, f.configs, err)
		}
	}
}
