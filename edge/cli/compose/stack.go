// Package compose turns compose files into what a swarm takes: service, secret and
// config specs and networks, named and labelled as `docker stack deploy` does, so that both tools see
// the same stack. What a swarm cannot do yet is refused by the name of its key.
//
// It reads files and environment variables that the caller names and changes nothing;
// it has no state. Finding the ids of secrets and configs, and telling the swarm, are
// left to the caller.
package compose

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/swarm"
)

// Labels that mark what belongs to a stack.
const (
	LabelNamespace = "com.docker.stack.namespace"
	LabelImage     = "com.docker.stack.image"
)

// Options says what to load.
type Options struct {
	// Files are merged in order; "-" is standard input, empty looks for compose.yaml.
	Files []string
	// EnvFiles replace .env beside the first file.
	EnvFiles []string
	// Profiles switch on services that name them.
	Profiles []string
	// Name is the stack; empty takes the file's name key, or its directory's name.
	Name string
	// Env is the environment of the process, each KEY=value.
	Env []string
}

// Stack is what compose files ask for.
type Stack struct {
	Name     string
	Services []Service
	Networks []Network
	Secrets  []Secret
	Configs  []Config
}

// Service is one service. The references to secrets and configs in Spec have names but
// no ids.
type Service struct {
	// Key is the service's name in the file; Spec.Name is its name in the swarm.
	Key  string
	Spec swarm.ServiceSpec
	// After are the keys of the services that must run, or for jobs be complete, before
	// this one is created.
	After []string
}

// Secret is a secret to make, or an external one that must be there.
type Secret struct {
	Spec     swarm.SecretSpec
	External bool
}

// Config is a config to make, or an external one that must be there.
type Config struct {
	Spec     swarm.ConfigSpec
	External bool
}

// Load reads compose files. Errors name the file, service and key that they are about.
func Load(ctx context.Context, o Options) (*Stack, error) {
	project, bad, err := read(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := refuse(bad, project); err != nil {
		return nil, err
	}
	return convert(project)
}

// read loads the files. bad are the keys that no stack has, of inactive services as well.
func read(ctx context.Context, o Options) (project *types.Project, bad []string, err error) {
	for _, f := range o.Files {
		if f == "-" {
			continue
		}
		if _, err := os.Stat(f); err != nil {
			return nil, nil, fmt.Errorf("read compose file: %w", err)
		}
	}
	options, err := cli.NewProjectOptions(o.Files,
		cli.WithEnv(o.Env),
		cli.WithEnvFiles(o.EnvFiles...),
		cli.WithDotEnv,
		cli.WithDefaultConfigPath,
	)
	if err != nil {
		return nil, nil, fmt.Errorf("read compose file: %w", err)
	}
	dir, err := options.GetWorkingDir()
	if err != nil {
		return nil, nil, fmt.Errorf("read compose file: %w", err)
	}
	details, err := options.ReadConfigFiles(ctx, dir, options)
	if err != nil {
		return nil, nil, fmt.Errorf("read compose file: %w", err)
	}
	details.Environment = options.Environment
	name, given := o.Name, o.Name != ""
	if !given {
		name = loader.NormalizeProjectName(filepath.Base(dir))
	} else if name != loader.NormalizeProjectName(name) {
		return nil, nil, fmt.Errorf("%q is not a name for a stack: use a-z, 0-9, _ and -", name)
	}
	settings := func(l *loader.Options) {
		l.SetProjectName(name, given)
		l.Profiles = o.Profiles
		if many := options.Environment["COMPOSE_PROFILES"]; len(l.Profiles) == 0 && many != "" {
			l.Profiles = strings.Split(many, ",")
		}
	}
	model, err := loader.LoadModelWithContext(ctx, *details, settings)
	if err != nil {
		return nil, nil, fmt.Errorf("read compose file: %w", err)
	}
	if declared, ok := model["name"].(string); ok {
		name, given = declared, true
	}
	if name == "" {
		return nil, nil, errors.New("the stack has no name: give it one with --name, or with the key name in the file")
	}
	bad = unsupported(model) // before the model is consumed
	project, err = loader.ModelToProject(model, loader.ToOptions(details, []func(*loader.Options){settings}), *details)
	if err != nil {
		return nil, nil, fmt.Errorf("read compose file: %w", err)
	}
	return project, bad, nil
}

func convert(p *types.Project) (*Stack, error) {
	s := &Stack{Name: p.Name}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(p.Secrets)) {
		one, err := s.secret(key, types.FileObjectConfig(p.Secrets[key]))
		s.Secrets = append(s.Secrets, one)
		errs = append(errs, err)
	}
	for _, key := range slices.Sorted(maps.Keys(p.Configs)) {
		one, err := s.config(key, types.FileObjectConfig(p.Configs[key]))
		s.Configs = append(s.Configs, one)
		errs = append(errs, err)
	}
	var err error
	s.Networks, err = s.networks(p)
	errs = append(errs, err)
	for _, key := range slices.Sorted(maps.Keys(p.Services)) {
		one, err := s.service(p, p.Services[key])
		s.Services = append(s.Services, one)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if len(s.Services) == 0 {
		return nil, errors.New("the compose files hold no service to deploy; services with profiles need --profile")
	}
	return s, nil
}

// labels returns labels with the stack's mark.
func (s *Stack) labels(given map[string]string) map[string]string {
	out := map[string]string{LabelNamespace: s.Name}
	maps.Copy(out, given)
	out[LabelNamespace] = s.Name
	return out
}

// scoped returns the name in the swarm of something that a file calls key.
func (s *Stack) scoped(key string) string { return s.Name + "_" + key }

func (s *Stack) secret(key string, f types.FileObjectConfig) (Secret, error) {
	at := "secrets." + key
	out := Secret{External: bool(f.External), Spec: swarm.SecretSpec{Annotations: swarm.Annotations{Name: f.Name}}}
	if out.External {
		return out, nil
	}
	out.Spec.Labels = s.labels(f.Labels)
	if f.TemplateDriver != "" {
		out.Spec.Templating = &swarm.Driver{Name: f.TemplateDriver}
	}
	if f.Driver != "" {
		out.Spec.Driver = &swarm.Driver{Name: f.Driver, Options: f.DriverOpts}
		return out, nil
	}
	var err error
	out.Spec.Data, err = data(at, f)
	return out, err
}

func (s *Stack) config(key string, f types.FileObjectConfig) (Config, error) {
	at := "configs." + key
	out := Config{External: bool(f.External), Spec: swarm.ConfigSpec{Annotations: swarm.Annotations{Name: f.Name}}}
	if out.External {
		return out, nil
	}
	out.Spec.Labels = s.labels(f.Labels)
	if f.TemplateDriver != "" {
		out.Spec.Templating = &swarm.Driver{Name: f.TemplateDriver}
	}
	var err error
	out.Spec.Data, err = data(at, f)
	return out, err
}

// data returns the content of a secret or config.
func data(at string, f types.FileObjectConfig) ([]byte, error) {
	switch {
	case f.File != "":
		content, err := os.ReadFile(f.File)
		if err != nil {
			return nil, fmt.Errorf("%s.file: %w", at, err)
		}
		if len(content) == 0 {
			return nil, fmt.Errorf("%s.file: %s is empty, which a swarm refuses", at, f.File)
		}
		return content, nil
	case f.Content != "":
		return []byte(f.Content), nil // the loader has put an environment variable here, too
	case f.Environment != "":
		return nil, fmt.Errorf("%s.environment: variable %s is not set", at, f.Environment)
	default:
		return nil, fmt.Errorf("%s: give it a file, environment or content, or say external: true", at)
	}
}

// sortedPairs returns KEY=value for each pair, in order.
func sortedPairs(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for k, v := range m {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

// orNil returns nil for an empty slice: two deploys of one file must compare equal.
func orNil[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return s
}

func trimmed(s string) string { return strings.TrimSpace(s) }
