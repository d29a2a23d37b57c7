package containerd

import "testing"

func TestInsecureRegistry(t *testing.T) {
	list := []string{"registry.lan", "10.1.0.0/16", "other.lan:5000", "fd00::/64"}
	for host, want := range map[string]bool{
		"registry.lan": true, "registry.lan:5000": true, "other.lan:5000": true, "other.lan": false, "other.lan:5001": false,
		"10.1.2.3": true, "10.1.2.3:5000": true, "10.2.2.3:5000": false, "[fd00::1]:5000": true, "[fd01::1]:5000": false,
		"docker.io": false, "": false,
	} {
		if got := insecure(host, list); got != want {
			t.Errorf("insecure(%q) = %t, want %t", host, got, want)
		}
	}
}
