package pki

import (
	"bytes"
	"crypto/rand"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestField(t *testing.T) {
	for a := 1; a < 256; a++ {
		if got := gfMul(byte(a), gfInverse(byte(a))); got != 1 {
			t.Fatalf("%d times its inverse is %d", a, got)
		}
	}
	// The example of FIPS 197, 4.2.
	if got := gfMul(0x57, 0x83); got != 0xc1 {
		t.Errorf("0x57 * 0x83 = %#x", got)
	}
}

// Any threshold of the shares make the key, in any order; fewer do not.
func TestShares(t *testing.T) {
	kek := make([]byte, KEKLength)
	for _, tt := range []struct{ n, threshold int }{{2, 2}, {3, 2}, {5, 3}, {255, 255}} {
		rand.Read(kek)
		shares, err := SplitKey(rand.Reader, kek, tt.n, tt.threshold)
		if err != nil || len(shares) != tt.n {
			t.Fatalf("%+v: %d shares, %v", tt, len(shares), err)
		}
		for first := range min(tt.n-tt.threshold+1, 5) {
			use := slices.Clone(shares[first : first+tt.threshold])
			slices.Reverse(use)
			if got, err := JoinShares(append(use, use[0])); err != nil || !bytes.Equal(got, kek) {
				t.Errorf("%+v from %d: %x, %v; want %x", tt, first, got, err, kek)
			}
			if _, err := JoinShares(append(slices.Clone(use[1:]), use[1])); err == nil || !strings.Contains(err.Error(), "shares that are needed") {
				t.Errorf("%+v with too few: %v", tt, err)
			}
		}
	}
	for _, tt := range []struct{ n, threshold int }{{1, 1}, {2, 3}, {256, 2}, {3, 1}} {
		if _, err := SplitKey(rand.Reader, kek, tt.n, tt.threshold); err == nil {
			t.Errorf("%+v was accepted", tt)
		}
	}
}

// The document's samples make the document's key.
func TestShareSamples(t *testing.T) {
	doc, err := os.ReadFile("../../docs/format/backup.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "```shares\n")
	block, _, ok := strings.Cut(rest, "\n```")
	if !ok {
		t.Fatal("the document has no samples")
	}
	var shares []Share
	for line := range strings.Lines(block) {
		s, err := ParseShare(line)
		if err != nil {
			t.Fatal(err)
		}
		shares = append(shares, s)
	}
	want := make([]byte, KEKLength)
	for i := range want {
		want[i] = byte(i)
	}
	for i := range shares {
		got, err := JoinShares([]Share{shares[i], shares[(i+1)%len(shares)]})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("samples from %d make %x, %v", i, got, err)
		}
	}
}

func TestForeignShares(t *testing.T) {
	kek, other := bytes.Repeat([]byte{1}, KEKLength), bytes.Repeat([]byte{2}, KEKLength)
	split := func(kek []byte) []Share {
		shares, err := SplitKey(rand.Reader, kek, 3, 2)
		if err != nil {
			t.Fatal(err)
		}
		return shares
	}
	a, b, c := split(kek), split(kek), split(other)
	if _, err := JoinShares([]Share{a[0], c[1]}); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("shares of two keys: %v", err)
	}
	if _, err := JoinShares([]Share{a[0], b[1]}); err == nil || !strings.Contains(err.Error(), "do not fit") {
		t.Errorf("shares of two splits: %v", err)
	}
	if _, err := JoinShares(nil); err == nil {
		t.Error("no shares make a key")
	}
	text := a[0].String()
	if got, err := ParseShare("  " + text + "\n"); err != nil || got != a[0] {
		t.Errorf("%s reads as %+v, %v", text, got, err)
	}
	for i := range text {
		bad := []byte(text)
		if bad[i] = 'A'; text[i] == 'A' {
			bad[i] = 'B'
		}
		if _, err := ParseShare(string(bad)); err == nil {
			t.Fatalf("a mistake at %d was not found", i)
		}
	}
}

// FuzzParseShare reads what people type.
func FuzzParseShare(f *testing.F) {
	shares, err := SplitKey(rand.Reader, make([]byte, KEKLength), 2, 2)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(shares[0].String())
	f.Add(sharePrefix)
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseShare(text)
		if err == nil && s.String() != strings.TrimSpace(text) {
			t.Errorf("%q reads as %s", text, s)
		}
	})
}
