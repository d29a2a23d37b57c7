package agent

import "testing"

// FuzzDecodeAuth reads what a service's spec carries as a credential: anything or nothing.
func FuzzDecodeAuth(f *testing.F) {
	f.Add("")
	f.Add("eyJ1c2VybmFtZSI6ImEiLCJwYXNzd29yZCI6ImIifQ==")
	f.Add("bnVsbA==")
	f.Fuzz(func(t *testing.T, text string) {
		if auth := decodeAuth(text); auth != nil && text == "" {
			t.Errorf("nothing reads as %v", auth)
		}
	})
}
