package compose

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
)

// tree is the set of keys that are honoured. A nil tree honours everything below; the
// key "*" stands for every name and "[]" for every element of a list.
type tree map[string]tree

func keys(names ...string) tree {
	t := tree{}
	for _, n := range names {
		t[n] = nil
	}
	return t
}

// with adds sub-trees to a copy of t.
func (t tree) with(name string, sub tree) tree {
	out := maps.Clone(t)
	out[name] = sub
	return out
}

// supported returns the keys of the compose specification that become part of a stack.
func supported() tree {
	update := keys("parallelism", "delay", "failure_action", "monitor", "max_failure_ratio", "order")
	deploy := keys("mode", "replicas", "labels", "endpoint_mode").
		with("update_config", update).
		with("rollback_config", update).
		with("restart_policy", keys("condition", "delay", "max_attempts", "window")).
		with("placement", keys("constraints", "max_replicas_per_node").with("preferences", tree{"[]": keys("spread")})).
		with("resources", tree{
			"limits":       keys("cpus", "memory", "pids"),
			"reservations": keys("cpus", "memory", "generic_resources"),
		})
	file := keys("source", "target", "uid", "gid", "mode")
	mount := keys("type", "source", "target", "read_only", "consistency").
		with("bind", keys("propagation", "create_host_path", "recursive")).
		with("volume", keys("labels", "nocopy", "subpath")).
		with("tmpfs", keys("size", "mode"))
	service := keys(
		"image", "command", "entrypoint", "environment", "env_file", "labels", "label_file", "hostname", "user", "group_add",
		"working_dir", "read_only", "init", "tty", "stdin_open", "cap_add", "cap_drop", "sysctls", "ulimits", "tmpfs", "security_opt",
		"stop_signal", "stop_grace_period", "extra_hosts", "dns", "dns_search", "dns_opt", "restart", "scale", "profiles", "platform",
		"expose", "cpus", "mem_limit", "mem_reservation", "memswap_limit", "mem_swappiness", "pids_limit", "oom_score_adj", "extends",
	).
		with("deploy", deploy).
		with("healthcheck", keys("test", "interval", "timeout", "retries", "start_period", "start_interval", "disable")).
		with("logging", keys("driver", "options")).
		with("ports", tree{"[]": keys("name", "mode", "target", "published", "protocol")}).
		with("volumes", tree{"[]": mount}).
		with("configs", tree{"[]": file}).
		with("secrets", tree{"[]": file}).
		with("depends_on", tree{"*": keys("condition", "required")}).
		with("networks", tree{"*": keys("aliases", "driver_opts")})
	pool := keys("subnet", "gateway", "ip_range").with("aux_addresses", nil)
	network := keys("name", "driver", "driver_opts", "attachable", "internal", "enable_ipv4", "enable_ipv6", "external", "labels").
		with("ipam", keys("driver").with("config", tree{"[]": pool}))
	object := keys("name", "file", "environment", "content", "external", "labels", "template_driver")
	return tree{
		"name": nil, "version": nil, "include": nil,
		"services": tree{"*": service},
		"secrets":  tree{"*": object.with("driver", nil).with("driver_opts", nil)},
		"configs":  tree{"*": object},
		"volumes":  tree{"*": keys("name", "driver", "driver_opts", "labels", "external")},
		"networks": tree{"*": network},
	}
}

// why says more about keys that people often meet.
func why(path string) string {
	last := path[strings.LastIndex(path, ".")+1:]
	switch last {
	case "links", "external_links":
		return "services of one network reach each other by name; further names are networks.NAME.aliases"
	case "network_mode":
		return "for the node's own network use an external network named host"
	case "ipv4_address", "ipv6_address", "mac_address":
		return "every task gets an address of its own"
	case "build":
		return "nodes run images, they do not build them: build and push the image, or load it on every node with `skep load`, and name it with image"
	case "container_name":
		return "every task's container has a name of its own"
	case "host_ip":
		return "a swarm publishes on all addresses of a node"
	case "privileged", "devices", "gpus", "userns_mode", "pid", "ipc", "uts", "cgroup_parent":
		return "services of a swarm do not have it"
	case "selinux":
		return "labels of bind mounts are not changed"
	default:
		return "not supported yet"
	}
}

// unsupported returns the paths of keys that have a value and would have no effect.
func unsupported(model map[string]any) []string {
	var bad []string
	walk(&bad, "", model, supported())
	slices.Sort(bad)
	return slices.Compact(bad)
}

// refuse turns paths into an error, but for those of services that no profile selects.
func refuse(bad []string, project *types.Project) error {
	var errs []error
	for _, path := range bad {
		if rest, ok := strings.CutPrefix(path, "services."); ok {
			if _, active := project.Services[rest[:strings.IndexAny(rest+".", ".[")]]; !active {
				continue
			}
		}
		errs = append(errs, fmt.Errorf("%s: %s", path, why(path)))
	}
	return errors.Join(errs...)
}

func walk(bad *[]string, path string, value any, t tree) {
	if t == nil {
		return
	}
	switch v := value.(type) {
	case map[string]any:
		for name, below := range v {
			at := strings.TrimPrefix(path+"."+name, ".")
			sub, ok := t[name]
			if !ok {
				sub, ok = t["*"]
			}
			switch {
			case strings.HasPrefix(name, "x-"): // a person's own key
			case ok:
				walk(bad, at, below, sub)
			case !isZero(below):
				*bad = append(*bad, at)
			}
		}
	case []any:
		for i, below := range v {
			walk(bad, fmt.Sprintf("%s[%d]", path, i), below, t["[]"])
		}
	}
}

// isZero reports whether a value asks for nothing.
func isZero(value any) bool {
	switch v := value.(type) {
	case nil:
		return true
	case bool:
		return !v
	case string:
		return v == ""
	case int:
		return v == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	default:
		return false
	}
}
