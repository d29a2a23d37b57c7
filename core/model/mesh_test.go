package model

import "testing"

func TestCheckMeshSource(t *testing.T) {
	for value, want := range map[string]Kind{"keep": 0, "masquerade": 0, "": Invalid, "Keep": Invalid, "client": Invalid} {
		if err := CheckMeshSource(map[string]string{MeshSourceLabel: value}); (err != nil) != (want != 0) || err != nil && KindOf(err) != want {
			t.Errorf("%q: %v", value, err)
		}
	}
	if err := CheckMeshSource(map[string]string{"other": "x"}); err != nil {
		t.Error(err)
	}
}
