package model

import (
	"fmt"
	"io"
	"math/big"
)

// IDLength is the number of characters of an object id.
const IDLength = 25

// NewID makes an object, node, session, cluster or subscription id from random:
// 25 characters of [0-9a-z]. The form is SwarmKit's: 17 bytes with the top bit set,
// in base 36, without the first character. It fails only if random does.
func NewID(random io.Reader) (string, error) {
	var b [17]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return "", fmt.Errorf("make id: %w", err)
	}
	b[0] |= 0x80
	return new(big.Int).SetBytes(b[:]).Text(36)[1 : 1+IDLength], nil
}
