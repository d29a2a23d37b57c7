package netdb

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/networkdb"
)

// encode wraps a message for the wire. Messages of ours always encode.
func encode(kind networkdb.MessageType, m proto.Message) []byte {
	data, err := proto.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("encode %s: %v", kind, err))
	}
	out, err := proto.Marshal(&networkdb.GossipMessage{Type: kind, Data: data})
	if err != nil {
		panic(fmt.Sprintf("encode %s: %v", kind, err))
	}
	return out
}

// compound wraps messages that are encoded already.
func compound(list [][]byte) []byte {
	m := &networkdb.CompoundMessage{Messages: make([]*networkdb.CompoundMessage_SimpleMessage, len(list))}
	for i, one := range list {
		m.Messages[i] = &networkdb.CompoundMessage_SimpleMessage{Payload: one}
	}
	return encode(networkdb.MessageType_COMPOUND, m)
}

// decodeMessage reads a message with its content.
func decodeMessage(data []byte) (proto.Message, error) {
	var outer networkdb.GossipMessage
	if err := proto.Unmarshal(data, &outer); err != nil {
		return nil, fmt.Errorf("read gossip: %w", err)
	}
	var m proto.Message
	switch outer.GetType() {
	case networkdb.MessageType_NODE_EVENT:
		m = new(networkdb.NodeEvent)
	case networkdb.MessageType_NETWORK_EVENT:
		m = new(networkdb.NetworkEvent)
	case networkdb.MessageType_TABLE_EVENT:
		m = new(networkdb.TableEvent)
	case networkdb.MessageType_PUSH_PULL:
		m = new(networkdb.NetworkPushPull)
	case networkdb.MessageType_BULK_SYNC:
		m = new(networkdb.BulkSyncMessage)
	case networkdb.MessageType_COMPOUND:
		m = new(networkdb.CompoundMessage)
	default:
		return nil, fmt.Errorf("read gossip: unknown message type %d", outer.GetType())
	}
	if err := proto.Unmarshal(outer.GetData(), m); err != nil {
		return nil, fmt.Errorf("read gossip: %s: %w", outer.GetType(), err)
	}
	if !sane(m) {
		return nil, fmt.Errorf("read gossip: %s is out of bounds", outer.GetType())
	}
	return m, nil
}

// sane reports whether a message keeps to the limits of names, values and times.
func sane(m proto.Message) bool {
	name := func(list ...string) bool {
		for _, s := range list {
			if s == "" || len(s) > maxName {
				return false
			}
		}
		return true
	}
	switch m := m.(type) {
	case *networkdb.NodeEvent:
		return name(m.GetNodeName()) && m.GetLTime() < maxTime
	case *networkdb.NetworkEvent:
		return name(m.GetNodeName(), m.GetNetworkId()) && m.GetLTime() < maxTime
	case *networkdb.TableEvent:
		return name(m.GetNodeName(), m.GetNetworkId(), m.GetTableName(), m.GetKey()) && m.GetLTime() < maxTime &&
			len(m.GetValue()) <= maxValue && !strings.Contains(m.GetKey(), "/")
	case *networkdb.NetworkPushPull:
		return name(m.GetNodeName()) && m.GetLTime() < maxTime
	case *networkdb.BulkSyncMessage:
		return name(m.GetNodeName()) && m.GetLTime() < maxTime
	}
	return true
}

// decodeCompound reads the messages of a compound message; nil if data is none.
func decodeCompound(data []byte) [][]byte {
	m, err := decodeMessage(data)
	if err != nil {
		return nil
	}
	c, ok := m.(*networkdb.CompoundMessage)
	if !ok {
		return nil
	}
	out := make([][]byte, len(c.GetMessages()))
	for i, one := range c.GetMessages() {
		out[i] = one.GetPayload()
	}
	return out
}
