// Package pki decides what the swarm's certificates, join tokens and key files look like:
// it makes and checks them, and says when a certificate is due for renewal. Formats follow
// SwarmKit (docs/format/identity.md).
//
// The package has no state; randomness and time are arguments. Keeping keys, serving
// certificates and talking TLS are for platform/keystore, control/ca and platform/wire.
package pki
