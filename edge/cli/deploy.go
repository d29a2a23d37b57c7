package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/edge/cli/compose"
)

type deployOptions struct {
	compose compose.Options
	load    []string
	wait    bool
	prune   bool
	auth    bool
	resolve string
	timeout time.Duration
}

func (a *app) deployCommand() *cobra.Command {
	var o deployOptions
	c := &cobra.Command{
		Use:   "deploy [FILE…]",
		Short: "Run the services of compose files, or bring them up to date",
		Long: `Run the services of compose files as a stack, or bring a running stack up to date. Several
files are merged in order; without one, compose.yaml of this directory is taken. Services,
secrets and configs get the names and labels that docker stack deploy gives them.

A key that has no effect in a swarm, or none yet, is refused by name and nothing is changed.`,
		Example: `  skep deploy compose.yaml --wait
  skep deploy --name shop compose.yaml production.yaml
  skep deploy --load images.tar compose.yaml`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, given []string) error {
			o.compose.Files, o.compose.Env = given, a.Environ()
			return a.deploy(c.Context(), o)
		},
	}
	c.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until all tasks run, and fail with the reason if they do not")
	c.Flags().StringVar(&o.compose.Name, "name", "", "name of the stack (default: the file's name key, or its directory)")
	c.Flags().BoolVar(&o.prune, "prune", false, "remove services of the stack that are no longer in the files")
	c.Flags().StringArrayVar(&o.compose.EnvFiles, "env-file", nil, "file with variables instead of .env (repeatable)")
	c.Flags().StringArrayVar(&o.compose.Profiles, "profile", nil, "switch on the services of a profile (repeatable)")
	c.Flags().StringArrayVar(&o.load, "load", nil, "load this archive of images onto this node first (repeatable)")
	c.Flags().BoolVar(&o.auth, "with-registry-auth", false, "send your registry credentials along, so that every node can pull")
	c.Flags().StringVar(&o.resolve, "resolve-image", "auto", "ask the registry for digests: always, changed (only when the file names another image), never, or auto (not for images that --load brought)")
	c.Flags().DurationVar(&o.timeout, "timeout", 5*time.Minute, "give up waiting after this time")
	return c
}

func (a *app) deploy(ctx context.Context, o deployOptions) error {
	if !slices.Contains([]string{"always", "changed", "never", "auto"}, o.resolve) {
		return fmt.Errorf("resolve-image %q is none of always, changed, never, auto", o.resolve)
	}
	stack, err := compose.Load(ctx, o.compose)
	if err != nil {
		return err
	}
	d, _, err := a.manager(ctx)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // only idle connections
	for _, file := range o.load {
		if err := a.load(ctx, d, file); err != nil {
			return err
		}
	}
	dep := &deployment{app: a, d: d, o: o, stack: stack, ids: map[string]string{}}
	if err := dep.networks(ctx); err != nil {
		return err
	}
	if err := dep.files(ctx); err != nil {
		return err
	}
	if o.prune {
		if err := dep.prune(ctx); err != nil {
			return err
		}
	}
	if err := dep.services(ctx); err != nil {
		return err
	}
	if o.wait {
		ctx, cancel := context.WithTimeout(ctx, o.timeout)
		defer cancel()
		if err := a.converge(ctx, d, dep.order); err != nil {
			return err
		}
	}
	if a.json {
		return a.printJSON(map[string]any{"stack": stack.Name, "services": dep.ids})
	}
	return nil
}

// deployment is one run of deploy against one swarm.
type deployment struct {
	*app

	d     *client.Client
	o     deployOptions
	stack *compose.Stack
	ids   map[string]string // service key to id
	order []string          // ids of the services as they were deployed
}

func ofStack(stack string) client.Filters {
	return client.Filters{}.Add("label", compose.LabelNamespace+"="+stack)
}

// files makes the stack's secrets and configs and puts their ids into the references.
func (p *deployment) files(ctx context.Context) error {
	secrets, configs := map[string]string{}, map[string]string{}
	for _, s := range p.stack.Secrets {
		id, err := p.secret(ctx, s)
		if err != nil {
			return err
		}
		secrets[s.Spec.Name] = id
	}
	for _, c := range p.stack.Configs {
		id, err := p.config(ctx, c)
		if err != nil {
			return err
		}
		configs[c.Spec.Name] = id
	}
	for _, s := range p.stack.Services {
		for _, r := range s.Spec.TaskTemplate.ContainerSpec.Secrets {
			r.SecretID = secrets[r.SecretName]
		}
		for _, r := range s.Spec.TaskTemplate.ContainerSpec.Configs {
			r.ConfigID = configs[r.ConfigName]
		}
	}
	return nil
}

func (p *deployment) secret(ctx context.Context, s compose.Secret) (string, error) {
	have, err := p.d.SecretInspect(ctx, s.Spec.Name, client.SecretInspectOptions{})
	switch {
	case errdefs.IsNotFound(err) && s.External:
		return "", fmt.Errorf("secret %s is declared external but does not exist: make it with `docker secret create`", s.Spec.Name)
	case errdefs.IsNotFound(err):
		made, err := p.d.SecretCreate(ctx, client.SecretCreateOptions{Spec: s.Spec})
		if err != nil {
			return "", fmt.Errorf("create secret %s: %w", s.Spec.Name, err)
		}
		p.say("created secret %s", s.Spec.Name)
		return made.ID, nil
	case err != nil:
		return "", fmt.Errorf("find secret %s: %w", s.Spec.Name, err)
	case s.External:
		return have.Secret.ID, nil
	}
	// The content of a secret cannot be read back, so the swarm is asked to accept it.
	_, err = p.d.SecretUpdate(ctx, have.Secret.ID, client.SecretUpdateOptions{Version: have.Secret.Version, Spec: s.Spec})
	return have.Secret.ID, immutable(err, "secret", s.Spec.Name)
}

func (p *deployment) config(ctx context.Context, c compose.Config) (string, error) {
	have, err := p.d.ConfigInspect(ctx, c.Spec.Name, client.ConfigInspectOptions{})
	switch {
	case errdefs.IsNotFound(err) && c.External:
		return "", fmt.Errorf("config %s is declared external but does not exist: make it with `docker config create`", c.Spec.Name)
	case errdefs.IsNotFound(err):
		made, err := p.d.ConfigCreate(ctx, client.ConfigCreateOptions{Spec: c.Spec})
		if err != nil {
			return "", fmt.Errorf("create config %s: %w", c.Spec.Name, err)
		}
		p.say("created config %s", c.Spec.Name)
		return made.ID, nil
	case err != nil:
		return "", fmt.Errorf("find config %s: %w", c.Spec.Name, err)
	case c.External:
		return have.Config.ID, nil
	case !bytes.Equal(have.Config.Spec.Data, c.Spec.Data):
		return "", immutable(errors.New("its content changed"), "config", c.Spec.Name)
	}
	_, err = p.d.ConfigUpdate(ctx, have.Config.ID, client.ConfigUpdateOptions{Version: have.Config.Version, Spec: c.Spec})
	return have.Config.ID, immutable(err, "config", c.Spec.Name)
}

// immutable explains the refusal to change a secret or config.
func immutable(err error, kind, name string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("update %s %s: %w\na %s cannot change; give the new content a new name (for example `name: %s_2`), and services move to it", kind, name, err, kind, name)
}

func (p *deployment) prune(ctx context.Context) error {
	have, err := p.d.ServiceList(ctx, client.ServiceListOptions{Filters: ofStack(p.stack.Name)})
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	for _, s := range have.Items {
		if slices.ContainsFunc(p.stack.Services, func(w compose.Service) bool { return w.Spec.Name == s.Spec.Name }) {
			continue
		}
		if _, err := p.d.ServiceRemove(ctx, s.ID, client.ServiceRemoveOptions{}); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove service %s: %w", s.Spec.Name, err)
		}
		p.say("removed service %s", s.Spec.Name)
	}
	return nil
}

// services creates and updates services, each after those that it depends on run.
func (p *deployment) services(ctx context.Context) error {
	left := slices.Clone(p.stack.Services)
	for len(left) > 0 {
		i := slices.IndexFunc(left, func(s compose.Service) bool {
			return !slices.ContainsFunc(s.After, func(key string) bool { return p.ids[key] == "" && p.has(key) })
		})
		if i < 0 {
			return fmt.Errorf("services.%s.depends_on: the services wait for each other", left[0].Key)
		}
		s := left[i]
		left = slices.Delete(left, i, i+1)
		if err := p.awaitOthers(ctx, s); err != nil {
			return err
		}
		id, err := p.service(ctx, s)
		if err != nil {
			return err
		}
		p.ids[s.Key] = id
		p.order = append(p.order, id)
	}
	return nil
}

func (p *deployment) has(key string) bool {
	return slices.ContainsFunc(p.stack.Services, func(s compose.Service) bool { return s.Key == key })
}

// awaitOthers waits until the services that s depends on run.
func (p *deployment) awaitOthers(ctx context.Context, s compose.Service) error {
	var ids []string
	for _, key := range s.After {
		if id := p.ids[key]; id != "" {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.o.timeout)
	defer cancel()
	if err := p.convergeFor(ctx, p.d, ids, 0); err != nil {
		return fmt.Errorf("wait for what services.%s depends on: %w", s.Key, err)
	}
	return nil
}

func (p *deployment) service(ctx context.Context, s compose.Service) (string, error) {
	auth, err := p.credentials(s.Spec.TaskTemplate.ContainerSpec.Image)
	if err != nil {
		return "", err
	}
	query := p.queries(ctx, s.Spec.TaskTemplate.ContainerSpec.Image)
	var id string
	var warnings []string
	done := "updated"
	err = retryConflict(ctx, func() error {
		have, err := p.d.ServiceInspect(ctx, s.Spec.Name, client.ServiceInspectOptions{})
		switch {
		case errdefs.IsNotFound(err):
			made, err := p.d.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: s.Spec, EncodedRegistryAuth: auth, QueryRegistry: query})
			if err != nil {
				return fmt.Errorf("create service %s: %w", s.Spec.Name, err)
			}
			id, warnings, done = made.ID, made.Warnings, "created"
			return nil
		case err != nil:
			return fmt.Errorf("find service %s: %w", s.Spec.Name, err)
		case have.Service.Spec.Labels[compose.LabelNamespace] != p.stack.Name:
			return fmt.Errorf("service %s exists and is not of the stack %s: choose another --name, or remove it", s.Spec.Name, p.stack.Name)
		}
		id = have.Service.ID
		spec := s.Spec
		spec.TaskTemplate.ForceUpdate = have.Service.Spec.TaskTemplate.ForceUpdate
		query := query
		if p.o.resolve == "changed" || !query {
			query = !keepImage(&spec, have.Service.Spec) && query
		}
		o := client.ServiceUpdateOptions{Version: have.Service.Version, Spec: spec, EncodedRegistryAuth: auth, QueryRegistry: query}
		if auth == "" {
			o.RegistryAuthFrom = swarm.RegistryAuthFromSpec
		}
		updated, err := p.d.ServiceUpdate(ctx, id, o)
		if err != nil {
			return fmt.Errorf("update service %s: %w", s.Spec.Name, err)
		}
		warnings = updated.Warnings
		return nil
	})
	if err != nil {
		return "", err
	}
	for _, w := range warnings {
		_, _ = fmt.Fprintln(p.Err, strings.TrimSpace(w)) // nobody to tell if the terminal is gone
	}
	p.say("%s service %s", done, s.Spec.Name)
	return id, nil
}

// keepImage gives a service the digest that it runs already, if the file names the same
// image as before, and reports whether it did: otherwise its tasks would be replaced.
func keepImage(spec *swarm.ServiceSpec, have swarm.ServiceSpec) bool {
	if have.Labels[compose.LabelImage] != spec.Labels[compose.LabelImage] || have.TaskTemplate.ContainerSpec == nil {
		return false
	}
	kept := *spec.TaskTemplate.ContainerSpec
	kept.Image = have.TaskTemplate.ContainerSpec.Image
	spec.TaskTemplate.ContainerSpec = &kept
	if p := have.TaskTemplate.Placement; p != nil && len(p.Platforms) > 0 {
		placement := swarm.Placement{}
		if spec.TaskTemplate.Placement != nil {
			placement = *spec.TaskTemplate.Placement
		}
		placement.Platforms = p.Platforms
		spec.TaskTemplate.Placement = &placement
	}
	return true
}

// queries reports whether to ask the registry which digest an image has now.
func (p *deployment) queries(ctx context.Context, image string) bool {
	switch {
	case p.o.resolve != "auto":
		return p.o.resolve != "never"
	case len(p.o.load) == 0:
		return true
	}
	_, err := p.d.ImageInspect(ctx, image)
	return err != nil
}

// credentials returns the docker client's credentials for an image, encoded for the API.
func (p *deployment) credentials(image string) (string, error) {
	if !p.o.auth {
		return "", nil
	}
	ref, err := name.ParseReference(image)
	if err != nil {
		return "", fmt.Errorf("read image name %q: %w", image, err)
	}
	found, err := authn.DefaultKeychain.Resolve(ref.Context())
	if err != nil {
		return "", fmt.Errorf("read registry credentials: %w", err)
	}
	c, err := found.Authorization()
	if err != nil {
		return "", fmt.Errorf("read registry credentials: %w", err)
	}
	if *c == (authn.AuthConfig{}) {
		return "", nil
	}
	encoded, err := authconfig.Encode(registry.AuthConfig{
		Username: c.Username, Password: c.Password, Auth: c.Auth, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
		ServerAddress: ref.Context().RegistryStr(),
	})
	if err != nil {
		return "", fmt.Errorf("encode registry credentials: %w", err)
	}
	return encoded, nil
}
