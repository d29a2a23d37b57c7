package netdb

import "time"

// What others can make a node remember. What is beyond is ignored and counted (Stats.Refused),
// and told again by bulk synchronization once there is room.
const (
	// maxNodes bounds the other nodes that are remembered, those that left included, which make
	// room first.
	maxNodes = 1 << 14
	// maxAttachments bounds the attachments of all other nodes to networks.
	maxAttachments = 1 << 18
	// maxRows bounds the rows of all networks together, deleted ones included, and maxBytes
	// what they take.
	maxRows  = 1 << 18
	maxBytes = 128 << 20
	// maxRelays bounds, in each network, the events of others that wait to be passed on.
	maxRelays = 4096
	// maxSync bounds the rows in a bulk synchronization and the attachments in a State: what others
	// than the sender published is left out beyond. Receivers take no messages of more than 20 MiB.
	maxSync = 16 << 20
	// maxName bounds names and ids, maxValue the value of a row.
	maxName  = 256
	maxValue = 16 << 10
	// maxTime bounds the clocks: a node that hears a greater time ignores the message, since
	// following it would leave nothing to count up to.
	maxTime = 1 << 62
	// maxStep bounds what one message can raise a clock by. Clocks begin at zero or at the
	// seconds since 1970.
	maxStep = 1 << 40
	// rowOverhead is what a row takes beside its key and value.
	rowOverhead = 200
	// entryOverhead is what an attachment takes in a State beside its names.
	entryOverhead = 24
)

// How long things are remembered, as Docker's nodes do.
const (
	// tombstoneAge is how long a deleted row is remembered.
	tombstoneAge = 30 * time.Minute
	// leavingAge is how long an attachment that ended is.
	leavingAge = tombstoneAge + 25*time.Second
	// failedRowsAge is how long the rows of a failed node are kept for its return.
	failedRowsAge = 30 * time.Minute
	// goneAge is how long a node that failed or left is remembered.
	goneAge = 24 * time.Hour
	// relayAge is how much longer than this a deletion of an unknown row must be remembered to
	// be passed on.
	relayAge = 5 * time.Minute
	// relaysWhileSyncing is how many events may wait for others to be passed on from a bulk
	// synchronization.
	relaysWhileSyncing = 500
)

const (
	retransmitMult = 4
	// packetSize is what a packet of events may hold, compoundHeader and eventHeader what its
	// wrapping takes.
	packetSize     = 1400
	compoundHeader = 5
	eventHeader    = 4
)
