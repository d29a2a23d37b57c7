package convert

import (
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
)

func storePrivileges(p *swarm.Privileges) (*api.Privileges, error) {
	if p == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	out := &api.Privileges{NoNewPrivileges: p.NoNewPrivileges}
	var err error
	if out.CredentialSpec, err = storeCredentials(p.CredentialSpec); err != nil {
		return nil, err
	}
	if s := p.SELinuxContext; s != nil {
		out.SelinuxContext = &api.Privileges_SELinuxContext{Disable: s.Disable, User: s.User, Role: s.Role, Type: s.Type, Level: s.Level}
	}
	if s := p.Seccomp; s != nil {
		mode, err := enum[api.Privileges_SeccompOpts_SeccompMode](api.Privileges_SeccompOpts_SeccompMode_value, string(s.Mode), "Seccomp mode")
		if err != nil {
			return nil, err
		}
		out.Seccomp = &api.Privileges_SeccompOpts{Mode: mode, Profile: slices.Clone(s.Profile)}
	}
	if a := p.AppArmor; a != nil {
		mode, err := enum[api.Privileges_AppArmorOpts_AppArmorMode](api.Privileges_AppArmorOpts_AppArmorMode_value, string(a.Mode), "AppArmor mode")
		if err != nil {
			return nil, err
		}
		out.Apparmor = &api.Privileges_AppArmorOpts{Mode: mode}
	}
	return out, nil
}

func storeCredentials(c *swarm.CredentialSpec) (*api.Privileges_CredentialSpec, error) {
	if c == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	out := new(api.Privileges_CredentialSpec)
	given := 0
	if c.Config != "" {
		given++
		out.Source = &api.Privileges_CredentialSpec_Config{Config: c.Config}
	}
	if c.File != "" {
		given++
		out.Source = &api.Privileges_CredentialSpec_File{File: c.File}
	}
	if c.Registry != "" {
		given++
		out.Source = &api.Privileges_CredentialSpec_Registry{Registry: c.Registry}
	}
	switch given {
	case 0:
		return nil, invalid(`invalid CredentialSpec: must either provide "file", "registry", or "config" for credential spec`)
	case 1:
		return out, nil
	default:
		return nil, invalid(`invalid CredentialSpec: cannot specify more than one of "file", "registry", and "config" credential specs`)
	}
}

func dockerPrivileges(p *api.Privileges) *swarm.Privileges {
	if p == nil {
		return nil
	}
	out := &swarm.Privileges{NoNewPrivileges: p.GetNoNewPrivileges()}
	if c := p.GetCredentialSpec(); c != nil {
		out.CredentialSpec = &swarm.CredentialSpec{Config: c.GetConfig(), File: c.GetFile(), Registry: c.GetRegistry()}
	}
	if s := p.GetSelinuxContext(); s != nil {
		out.SELinuxContext = &swarm.SELinuxContext{Disable: s.GetDisable(), User: s.GetUser(), Role: s.GetRole(), Type: s.GetType(), Level: s.GetLevel()}
	}
	if s := p.GetSeccomp(); s != nil {
		out.Seccomp = &swarm.SeccompOpts{Mode: swarm.SeccompMode(word(s.GetMode())), Profile: slices.Clone(s.GetProfile())}
	}
	if a := p.GetApparmor(); a != nil {
		out.AppArmor = &swarm.AppArmorOpts{Mode: swarm.AppArmorMode(word(a.GetMode()))}
	}
	return out
}
