// Package backup says what a backup of a swarm holds and how a swarm goes on from one. It
// decides only: it turns a state into bytes, bytes into a state, and a state into that of a
// swarm with one new manager. Who encrypts, stores and starts is others' business.
//
// All functions are pure and may be called from any goroutine.
package backup
