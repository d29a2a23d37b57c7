// Package netdb is one node's replica of the tables that Docker's nodes gossip: which nodes
// are there, which networks each takes part in, and the rows that each publishes in them.
//
// It decides what a message changes, what is worth telling others and what is forgotten
// when, and encodes and reads the messages (docs/format/gossip.md). A DB belongs to one
// goroutine at a time; worker/gossip owns it and does the sending. Whoever has the gossip
// keys can claim anything: rows are never more than other nodes' word, and what they may
// cost in memory has limits, named in limits.go.
package netdb
