package docker

import (
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// NewContainerID returns 64 random hex digits. Like Docker's, the id never reads as
// a decimal number in its first twelve digits, which some tools would take for one.
func NewContainerID(random io.Reader) (string, error) {
	var b [32]byte
	for {
		if _, err := io.ReadFull(random, b[:]); err != nil {
			return "", fmt.Errorf("make container id: %w", err)
		}
		id := hex.EncodeToString(b[:])
		if strings.ContainsAny(id[:12], "abcdef") {
			return id, nil
		}
	}
}

// ValidateName checks the name a user gave to a container, volume or similar.
func ValidateName(name string) error {
	if validName(strings.TrimPrefix(name, "/")) {
		return nil
	}
	return model.Errorf(model.Invalid,
		"Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
}

// ValidateVolumeName checks the name of a local volume.
func ValidateVolumeName(name string) error {
	if len(name) == 1 {
		return model.Errorf(model.Invalid, "volume name is too short, names should be at least two alphanumeric characters")
	}
	if validName(name) {
		return nil
	}
	return model.Errorf(model.Invalid,
		"create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path",
		name, name)
}

func validName(name string) bool {
	if len(name) < 2 {
		return false
	}
	for i, c := range []byte(name) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return true
}

// GenerateName makes a name such as "mellow_clover" that taken does not hold;
// after a few attempts it appends a number.
func GenerateName(random io.Reader, taken func(string) bool) (string, error) {
	adjectives := strings.Fields("amber brisk calm clever dapper eager fair gentle golden happy honest humming jolly keen kind lively lucky mellow merry mild neat nimble noble patient plucky proud quick quiet rapid ready rosy rustic sharp shiny silent sleek smart snug spry steady still stout sunny sweet swift tidy warm wild wise witty zesty")
	nouns := strings.Fields("acacia alder apiary aster balm basil bee bloom borage brood buzz cell clover colony comb cosmos daisy drone elder fennel field forager frame garden hazel heath heather hive honey hyssop ivy lavender lilac linden lupin mallow maple meadow mead mint nectar orchard pollen poppy propolis queen rose sage scout skep sorrel swarm thistle thyme verbena wax willow wing yarrow")
	var b [5]byte
	for attempt := range 100 {
		if _, err := io.ReadFull(random, b[:]); err != nil {
			return "", fmt.Errorf("make container name: %w", err)
		}
		a := (int(b[0])<<8 | int(b[1])) % len(adjectives)
		n := (int(b[2])<<8 | int(b[3])) % len(nouns)
		name := adjectives[a] + "_" + nouns[n]
		if attempt >= 4 {
			name = fmt.Sprintf("%s%d", name, int(b[4])+attempt)
		}
		if !taken(name) {
			return name, nil
		}
	}
	return NewContainerID(random)
}
