package convert_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/edge/dockerapi/convert"
)

// FuzzServiceSpec stores what any client may send. Reading it and storing that again
// must change nothing.
func FuzzServiceSpec(f *testing.F) {
	files, err := filepath.Glob("testdata/*.in.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"TaskTemplate":{"ContainerSpec":{"Secrets":[null],"Configs":[null],"Ulimits":[null],"Mounts":[{}]}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec swarm.ServiceSpec
		if json.Unmarshal(data, &spec) != nil {
			return
		}
		stored, err := convert.StoreServiceSpec(spec, nil)
		if err != nil {
			return
		}
		wire, err := proto.Marshal(stored)
		if err != nil {
			return // text that is no UTF-8, which gRPC refuses
		}
		stored.Reset()
		if err := proto.Unmarshal(wire, stored); err != nil {
			t.Fatal(err)
		}
		again, err := convert.StoreServiceSpec(convert.DockerServiceSpec(stored), nil)
		if err != nil {
			t.Fatalf("what is read cannot be stored: %v", err)
		}
		if !proto.Equal(stored, again) {
			t.Errorf("stored: %v\nagain:  %v", stored, again)
		}
	})
}
