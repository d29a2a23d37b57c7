package ops

import (
	"slices"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// checkSecrets checks a service's secret references: well formed, distinct targets,
// and the secrets exist.
func checkSecrets(s *store.Snapshot, refs []*api.SecretReference) error {
	used := make(map[string]string)
	var missing []string
	for _, r := range refs {
		if r.GetSecretId() == "" || r.GetSecretName() == "" {
			return invalid("malformed secret reference")
		}
		if r.GetTarget() == nil {
			return invalid("malformed secret reference, no target provided")
		}
		target := r.GetFile().GetName()
		if target == "" {
			return invalid("malformed file secret reference, invalid target file name provided")
		}
		if other, taken := used[target]; taken {
			return invalid("secret references '%s' and '%s' have a conflicting target: '%s'", other, r.GetSecretName(), target)
		}
		used[target] = r.GetSecretName()
		if s.Get(model.Secrets, r.GetSecretId()) == nil {
			missing = append(missing, r.GetSecretName())
		}
	}
	return notAllFound("secret", missing)
}

// checkConfigs is checkSecrets for configs, whose target may also be the runtime.
func checkConfigs(s *store.Snapshot, refs []*api.ConfigReference) error {
	used := make(map[string]string)
	var missing []string
	for _, r := range refs {
		if r.GetConfigId() == "" || r.GetConfigName() == "" {
			return invalid("malformed config reference")
		}
		switch t := r.GetTarget().(type) {
		case nil:
			return invalid("malformed config reference, no target provided")
		case *api.ConfigReference_File:
			target := t.File.GetName()
			if target == "" {
				return invalid("malformed file config reference, invalid target file name provided")
			}
			if other, taken := used[target]; taken {
				return invalid("config references '%s' and '%s' have a conflicting target: '%s'", other, r.GetConfigName(), target)
			}
			used[target] = r.GetConfigName()
		}
		if s.Get(model.Configs, r.GetConfigId()) == nil {
			missing = append(missing, r.GetConfigName())
		}
	}
	return notAllFound("config", missing)
}

func notAllFound(what string, names []string) error {
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) > 1 {
		what += "s"
	}
	return invalid("%s not found: %s", what, strings.Join(names, ", "))
}
