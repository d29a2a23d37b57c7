package compose

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestGolden(t *testing.T) {
	for name, o := range map[string]Options{
		"small":     {Files: []string{"testdata/small/compose.yaml"}},
		"full":      {Files: []string{"testdata/full/compose.yaml"}, Env: []string{"FROM_ENV=set"}},
		"two files": {Files: []string{"testdata/full/compose.yaml", "testdata/full/production.yaml"}, Env: []string{"TAG=9"}, Name: "other"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Load(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			here, err := filepath.Abs("testdata")
			if err != nil {
				t.Fatal(err)
			}
			got = append(bytes.ReplaceAll(got, []byte(here), []byte("HERE")), '\n')
			file := filepath.Join("testdata", strings.ReplaceAll(name, " ", "-")+".golden.json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("-want +got (rewrite with -update):\n%s", diff)
			}
			again, err := Load(t.Context(), o)
			if diff := cmp.Diff(s, again, cmpopts.EquateComparable(netip.Addr{})); err != nil || diff != "" {
				t.Errorf("a second load differs: %v\n%s", err, diff)
			}
		})
	}
}

// TestRefusals holds the text that a person meets for what a swarm does not do.
func TestRefusals(t *testing.T) {
	service := func(body string) string { return "name: s\nservices:\n  web:\n    image: x\n" + body }
	for name, c := range map[string]struct{ file, want string }{
		"host ip":            {service("    ports: [{target: 80, mode: host, host_ip: 127.0.0.1}]\n"), "services.web.ports[0].host_ip: a swarm publishes on all addresses"},
		"port range":         {service("    ports: [{target: 80, published: 8000-8010, mode: host}]\n"), "services.web.ports[0].published: \"8000-8010\" is not one port"},
		"network mode":       {service("    network_mode: host\n"), "services.web.network_mode: for the node's own network use an external network named host"},
		"task address":       {service("    networks: {default: {ipv4_address: 10.0.0.9}}\n"), "services.web.networks.default.ipv4_address: every task gets an address of its own"},
		"subnet":             {service("") + "networks: {default: {ipam: {config: [{subnet: ten}]}}}\n", "networks.default.ipam.config[0].subnet: \"ten\" is not an address"},
		"port mode":          {service("    ports: [{target: 80, mode: odd}]\n"), "services.web.ports[0].mode: \"odd\" is neither ingress nor host"},
		"build":              {service("    build: .\n"), "services.web.build: nodes run images"},
		"privileged":         {service("    privileged: true\n"), "services.web.privileged: services of a swarm do not have it"},
		"container name":     {service("    container_name: web\n"), "services.web.container_name: every task's container has a name of its own"},
		"links":              {service("    links: [web2]\n  web2: {image: y}\n"), "services.web.links: services of one network reach each other by name"},
		"devices":            {service("    devices: ['/dev/null:/dev/null']\n"), "services.web.devices: services of a swarm"},
		"shm":                {service("    shm_size: 64m\n"), "services.web.shm_size: not supported yet"},
		"hooks":              {service("    post_start: [{command: ls}]\n"), "services.web.post_start: not supported yet"},
		"device reservation": {service("    deploy: {resources: {reservations: {devices: [{capabilities: [gpu]}]}}}\n"), "services.web.deploy.resources.reservations.devices: services"},
		"selinux":            {service("    volumes: ['/a:/a:z']\n"), "services.web.volumes[0].bind.selinux: labels of bind mounts"},
		"no image":           {"name: s\nservices:\n  web:\n    command: x\n", "neither an image"},
		"volume undeclared":  {service("    volumes: ['data:/data']\n"), "data"},
		"volume image":       {service("    volumes: [{type: image, source: x, target: /x}]\n"), "services.web.volumes[0].type: \"image\" is none of"},
		"two mounts":         {service("    tmpfs: [/a]\n    volumes: ['/x:/a']\n"), "target /a already mounted"},
		"tmpfs option":       {service("    tmpfs: ['/a:huge=always']\n"), "option \"huge\" is not supported"},
		"mode":               {service("    deploy: {mode: sometimes}\n"), "services.web.deploy.mode: \"sometimes\" is none of"},
		"global replicas":    {service("    deploy: {mode: global, replicas: 2}\n"), "services.web.deploy.replicas: a global service"},
		"restart":            {service("    restart: maybe\n"), "services.web.restart"},
		"condition":          {service("    deploy: {restart_policy: {condition: maybe}}\n"), "services.web.deploy.restart_policy.condition: \"maybe\""},
		"failure action":     {service("    deploy: {update_config: {failure_action: maybe}}\n"), "services.web.deploy.update_config.failure_action"},
		"order":              {service("    deploy: {rollback_config: {order: maybe}}\n"), "services.web.deploy.rollback_config.order"},
		"endpoint mode":      {service("    deploy: {endpoint_mode: maybe}\n"), "services.web.deploy.endpoint_mode"},
		"security option":    {service("    security_opt: ['label:disable']\n"), "services.web.security_opt: \"label:disable\" is not supported"},
		"dns":                {service("    dns: [nowhere]\n"), "services.web.dns: \"nowhere\" is not an IP address"},
		"swap":               {service("    memswap_limit: 10m\n"), "services.web.memswap_limit"},
		"platform":           {service("    platform: linux\n"), "services.web.platform: \"linux\""},
		"secret undeclared":  {service("    secrets: [x]\n"), "x"},
		"secret empty":       {service("    secrets: [x]\n") + "secrets: {x: {environment: NOPE}}\n", "NOPE"},
		"unknown key":        {service("    colour: red\n"), "colour"},
		"not yaml":           {"a: [", "compose"},
		"nothing":            {"name: s\nservices: {}\n", "no service"},
		"both":               {service("    build: .\n    privileged: true\n"), "services.web.build: nodes run images, they do not build them: build and push the image, or load it on every node with `skep load`, and name it with image\nservices.web.privileged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "compose.yaml")
			if err := os.WriteFile(file, []byte(c.file), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Load(t.Context(), Options{Files: []string{file}})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v\nwant it to contain %s", err, c.want)
			}
		})
	}
}

// TestNothingAskedForIsNothingRefused: keys with values that ask for nothing pass.
func TestNothingAskedForIsNothingRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "compose.yaml")
	text := "name: s\nservices:\n  web:\n    image: x\n    privileged: false\n    devices: []\n    networks: [default]\n    x-mine: {a: 1}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Load(t.Context(), Options{Files: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Services[0].Spec.TaskTemplate.Networks; len(n) != 1 || n[0].Target != "s_default" || len(s.Networks) != 1 {
		t.Errorf("networks %v %v", n, s.Networks)
	}
}

// TestNetworks holds what of a file's networks reaches the swarm.
func TestNetworks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "compose.yaml")
	text := `name: s
services:
  web:
    image: x
    ports: ["8080:80"]
    networks: {front: {aliases: [www]}, outside: {}}
  agent: {image: x, networks: [node]}
  alone: {image: x}
networks:
  front:
    driver_opts: {com.docker.network.driver.mtu: "1400"}
    attachable: true
    internal: true
    enable_ipv6: true
    labels: {a: b}
    ipam: {config: [{subnet: 10.9.0.0/16, ip_range: 10.9.4.0/24, gateway: 10.9.0.1, aux_addresses: {printer: 10.9.4.9}}]}
  outside: {external: true, name: shared}
  node: {external: true, name: host}
  unused: {}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Load(t.Context(), Options{Files: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	mark := map[string]string{LabelNamespace: "s"}
	want := []Network{
		{Spec: network.CreateRequest{Name: "s_default", Driver: "overlay", Labels: mark}},
		{Spec: network.CreateRequest{
			Name: "s_front", Driver: "overlay", Options: map[string]string{"com.docker.network.driver.mtu": "1400"}, Attachable: true, Internal: true,
			EnableIPv6: new(true), Labels: map[string]string{"a": "b", LabelNamespace: "s"},
			IPAM: &network.IPAM{Config: []network.IPAMConfig{{
				Subnet: netip.MustParsePrefix("10.9.0.0/16"), IPRange: netip.MustParsePrefix("10.9.4.0/24"), Gateway: netip.MustParseAddr("10.9.0.1"),
				AuxAddress: map[string]netip.Addr{"printer": netip.MustParseAddr("10.9.4.9")},
			}}},
		}},
		{External: true, Spec: network.CreateRequest{Name: "shared"}},
	}
	if diff := cmp.Diff(want, s.Networks, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	attached := map[string][]swarm.NetworkAttachmentConfig{
		"web":   {{Target: "s_front", Aliases: []string{"www", "web"}}, {Target: "shared", Aliases: []string{"web"}}},
		"agent": {{Target: "host"}},
		"alone": {{Target: "s_default", Aliases: []string{"alone"}}},
	}
	for _, service := range s.Services {
		if diff := cmp.Diff(attached[service.Key], service.Spec.TaskTemplate.Networks); diff != "" {
			t.Errorf("%s: %s", service.Key, diff)
		}
		if service.Key == "web" && service.Spec.EndpointSpec.Ports[0].PublishMode != swarm.PortConfigPublishModeIngress {
			t.Errorf("ports %v", service.Spec.EndpointSpec.Ports)
		}
	}
}

func TestStackName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "My.App")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "compose.yaml")
	if err := os.WriteFile(file, []byte("services: {web: {image: x}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Load(t.Context(), Options{Files: []string{file}})
	if err != nil || s.Name != "myapp" {
		t.Errorf("name of the directory: %v, %v", s, err)
	}
	s, err = Load(t.Context(), Options{Files: []string{file}, Name: "shop"})
	if err != nil || s.Services[0].Spec.Name != "shop_web" {
		t.Errorf("given name: %v, %v", s, err)
	}
	if _, err = Load(t.Context(), Options{Files: []string{file}, Name: "Not Good"}); err == nil {
		t.Error("a bad name was accepted")
	}
	if _, err := Load(t.Context(), Options{Files: []string{filepath.Join(dir, "none.yaml")}}); err == nil || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("missing file: %v", err)
	}
}

func FuzzTmpfs(f *testing.F) {
	f.Add("/run:size=64m,mode=1777")
	f.Add("/run")
	f.Add("run:ro")
	f.Add("/a:size=")
	f.Fuzz(func(t *testing.T, text string) {
		m, err := tmpfs("x", text)
		if err == nil && !filepath.IsAbs(m.Target) {
			t.Errorf("%q gives target %q", text, m.Target)
		}
	})
}
