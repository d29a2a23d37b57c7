package ops

import (
	"time"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
)

const (
	minNanoCPUs = 1_000_000
	minMemory   = 4 << 20
	minHealth   = time.Millisecond
)

// validateService checks what a spec alone can tell; checkService the rest.
func validateService(spec *api.ServiceSpec) error {
	if spec == nil {
		return invalid("no service spec given")
	}
	for _, check := range []func(*api.ServiceSpec) error{
		func(s *api.ServiceSpec) error { return validName(s.GetAnnotations()) },
		func(s *api.ServiceSpec) error { return model.CheckMeshSource(s.GetAnnotations().GetLabels()) },
		func(s *api.ServiceSpec) error { return validateTask(s.GetTask()) },
		validateMode,
		func(s *api.ServiceSpec) error { return validateUpdate(s.GetUpdate()) },
		func(s *api.ServiceSpec) error { return validateUpdate(s.GetRollback()) },
		func(s *api.ServiceSpec) error { return validateEndpoint(s.GetEndpoint()) },
	} {
		if err := check(spec); err != nil {
			return err
		}
	}
	return nil
}

func validateTask(t *api.TaskSpec) error {
	if err := validateResources(t.GetResources()); err != nil {
		return err
	}
	if negative(t.GetRestart().GetDelay()) {
		return invalid("TaskSpec: restart-delay cannot be negative")
	}
	if negative(t.GetRestart().GetWindow()) {
		return invalid("TaskSpec: restart-window cannot be negative")
	}
	if _, err := model.ParseConstraints(t.GetPlacement().GetConstraints()); err != nil {
		// Docker answers these without a code.
		return model.Errorf(model.Internal, "%v", err)
	}
	switch r := t.GetRuntime().(type) {
	case *api.TaskSpec_Container:
		return validateContainer(r.Container)
	case *api.TaskSpec_Generic:
		return model.Errorf(model.Unimplemented, "runtime %q is not implemented by skep: services run containers", r.Generic.GetKind())
	case *api.TaskSpec_Attachment:
		return invalid("TaskSpec: a service cannot be a network attachment")
	default:
		return invalid("TaskSpec: missing runtime")
	}
}

func negative(d *durationpb.Duration) bool { return d.AsDuration() < 0 }

func validateResources(r *api.ResourceRequirements) error {
	for _, part := range []*api.Resources{r.GetLimits(), r.GetReservations()} {
		if cpu := part.GetNanoCpus(); cpu != 0 && cpu < minNanoCPUs {
			return invalid("invalid cpu value %g: Must be at least %g", float64(cpu)/1e9, float64(minNanoCPUs)/1e9)
		}
		if memory := part.GetMemoryBytes(); memory != 0 && memory < minMemory {
			return invalid("invalid memory value %d: Must be at least 4MiB", memory)
		}
	}
	for _, g := range r.GetReservations().GetGeneric() {
		if g.GetDiscreteResourceSpec() == nil {
			return invalid("generic resource %q: only amounts can be reserved, not names", g.GetNamedResourceSpec().GetKind())
		}
	}
	return nil
}

func validateContainer(c *api.ContainerSpec) error {
	if c.GetImage() == "" {
		return invalid("ContainerSpec: image reference must be provided")
	}
	if _, err := reference.ParseNormalizedNamed(c.GetImage()); err != nil {
		return invalid("ContainerSpec: %q is not a valid repository/tag", c.GetImage())
	}
	targets := make(map[string]bool)
	for _, m := range c.GetMounts() {
		if targets[m.GetTarget()] {
			return invalid("ContainerSpec: duplicate mount point: %s", m.GetTarget())
		}
		targets[m.GetTarget()] = true
		if m.GetType() == api.Mount_CLUSTER {
			return model.Errorf(model.Unimplemented, "mount %s: cluster volumes are not implemented by skep", m.GetTarget())
		}
	}
	if err := validateHealth(c.GetHealthcheck()); err != nil {
		return err
	}
	if err := lifecycle.CheckTemplates(c); err != nil {
		return invalid("%v", err)
	}
	return nil
}

func validateHealth(h *api.HealthConfig) error {
	for _, d := range []struct {
		name  string
		value *durationpb.Duration
	}{
		{"Interval", h.GetInterval()},
		{"Timeout", h.GetTimeout()},
		{"StartPeriod", h.GetStartPeriod()},
		{"StartInterval", h.GetStartInterval()},
	} {
		if v := d.value.AsDuration(); v != 0 && v < minHealth {
			return invalid("ContainerSpec: %s in HealthConfig cannot be less than %s", d.name, minHealth)
		}
	}
	if h.GetRetries() < 0 {
		return invalid("ContainerSpec: Retries in HealthConfig cannot be negative")
	}
	return nil
}

func validateMode(spec *api.ServiceSpec) error {
	if isJob(spec) && spec.GetUpdate() != nil {
		return invalid("Jobs may not have an update config")
	}
	if spec.GetMode() == nil {
		return invalid("no service mode given")
	}
	return nil
}

func validateUpdate(u *api.UpdateConfig) error {
	switch {
	case negative(u.GetDelay()):
		return invalid("TaskSpec: update-delay cannot be negative")
	case negative(u.GetMonitor()):
		return invalid("TaskSpec: update-monitor cannot be negative")
	case u.GetMaxFailureRatio() < 0 || u.GetMaxFailureRatio() > 1:
		return invalid("TaskSpec: update-maxfailureratio cannot be less than 0 or bigger than 1")
	default:
		return nil
	}
}
