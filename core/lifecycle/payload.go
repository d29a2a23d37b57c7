package lifecycle

import (
	"errors"
	"strings"
	"text/template"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// TemplateDriver is the one template driver of secrets and configs that there is.
const TemplateDriver = "golang"

// Payloads is what the templates in one task's secrets and configs may refer to.
type Payloads struct {
	task *api.Task
	// container is the task's container spec, expanded.
	container        *api.ContainerSpec
	node             TemplateNode
	secrets, configs map[string][]byte // by id
}

// NewPayloads returns the payloads of a task. container is its spec as Expand made it;
// secrets and configs hold the data by id. Nothing is changed.
func NewPayloads(task *api.Task, container *api.ContainerSpec, node TemplateNode, secrets, configs map[string][]byte) *Payloads {
	return &Payloads{task: task, container: container, node: node, secrets: secrets, configs: configs}
}

// Expand returns the data of a secret or config with its placeholders replaced; without
// templating it is what it was. What a template takes from another secret or config is not
// expanded itself.
func (p *Payloads) Expand(templating *api.Driver, data []byte) ([]byte, error) {
	if templating == nil {
		return data, nil
	}
	if err := checkDriver(templating); err != nil {
		return nil, err
	}
	out, err := expandWith(string(data), dataOf(p.task, p.node), template.FuncMap{"secret": p.secret, "config": p.config, "env": p.env})
	if err != nil {
		return nil, quiet(err)
	}
	return []byte(out), nil
}

func (p *Payloads) secret(target string) (string, error) {
	for _, ref := range p.container.GetSecrets() {
		if ref.GetFile().GetName() == target {
			if data, ok := p.secrets[ref.GetSecretId()]; ok {
				return string(data), nil
			}
		}
	}
	return "", missing("secret target " + target)
}

func (p *Payloads) config(target string) (string, error) {
	for _, ref := range p.container.GetConfigs() {
		if ref.GetFile().GetName() == target {
			if data, ok := p.configs[ref.GetConfigId()]; ok {
				return string(data), nil
			}
		}
	}
	return "", missing("config target " + target)
}

func (p *Payloads) env(name string) (string, error) {
	for _, env := range p.container.GetEnv() {
		if key, value, ok := strings.Cut(env, "="); ok && key == name {
			return value, nil
		}
	}
	return "", missing("environment variable " + name)
}

// missing is what a template asked for in vain.
type missing string

// Error says so.
func (m missing) Error() string { return string(m) + " not found" }

// CheckPayload refuses what Expand would refuse of every task: an unknown driver, or data
// that is no template.
func CheckPayload(templating *api.Driver, data []byte) error {
	if templating == nil {
		return nil
	}
	if err := checkDriver(templating); err != nil {
		return err
	}
	one := func(string) (string, error) { return "", nil }
	_, err := parseTemplate(string(data), template.FuncMap{"secret": one, "config": one, "env": one})
	return quiet(err)
}

func checkDriver(templating *api.Driver) error {
	if templating.GetName() != TemplateDriver {
		return model.Errorf(model.Invalid, "template driver %q is not known: use %s", templating.GetName(), TemplateDriver)
	}
	return nil
}

// quiet keeps what a template says out of its error: a secret can be a template, and errors
// are shown and logged. Only the place and the kind of the fault are left.
func quiet(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if m, ok := errors.AsType[missing](err); ok {
		return model.Errorf(model.Invalid, "template%s: %s", line(text), m.Error())
	}
	for _, reason := range []string{
		"range is for fields only", "expands to more than", "map has no entry", "can't evaluate field", "not defined", "unclosed action", "unexpected",
	} {
		if strings.Contains(text, reason) {
			return model.Errorf(model.Invalid, "template%s: %s", line(text), reason)
		}
	}
	return model.Errorf(model.Invalid, "template%s: it cannot be expanded", line(text))
}

// line returns the line number that text/template's errors carry, as ", line N".
func line(text string) string {
	rest, ok := strings.CutPrefix(text, "template: expansion:")
	if !ok {
		return ""
	}
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	if digits == "" {
		return ""
	}
	return ", line " + digits
}
