package convert

import (
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
)

// StoreSecretSpec returns what is stored of a secret spec.
func StoreSecretSpec(s swarm.SecretSpec) *api.SecretSpec {
	return &api.SecretSpec{
		Annotations: storeAnnotations(s.Annotations), Data: slices.Clone(s.Data),
		Driver: storeDriver(s.Driver), Templating: storeDriver(s.Templating),
	}
}

// DockerSecret returns what clients read of a secret: never its data.
func DockerSecret(s *api.Secret) swarm.Secret {
	return swarm.Secret{
		ID: s.GetId(), Meta: meta(s.GetMeta()),
		Spec: swarm.SecretSpec{
			Annotations: dockerAnnotations(s.GetSpec().GetAnnotations()),
			Driver:      dockerDriver(s.GetSpec().GetDriver()), Templating: dockerDriver(s.GetSpec().GetTemplating()),
		},
	}
}

// StoreConfigSpec returns what is stored of a config spec.
func StoreConfigSpec(s swarm.ConfigSpec) *api.ConfigSpec {
	return &api.ConfigSpec{
		Annotations: storeAnnotations(s.Annotations), Data: slices.Clone(s.Data), Templating: storeDriver(s.Templating),
	}
}

// DockerConfig returns what clients read of a config.
func DockerConfig(c *api.Config) swarm.Config {
	return swarm.Config{
		ID: c.GetId(), Meta: meta(c.GetMeta()),
		Spec: swarm.ConfigSpec{
			Annotations: dockerAnnotations(c.GetSpec().GetAnnotations()),
			Data:        slices.Clone(c.GetSpec().GetData()), Templating: dockerDriver(c.GetSpec().GetTemplating()),
		},
	}
}
