package store

import "github.com/tidwall/btree"

// tree is an ordered map that shares its nodes with copies of itself. A copy is the plain
// value with owned cleared; the nodes are split from the original at its first change, so
// that a transaction costs what it touches. The zero value is empty.
type tree[V any] struct {
	nodes *btree.Map[string, V] // nil while empty
	owned bool                  // nobody else sees nodes
}

func (t *tree[V]) get(key string) (none V, ok bool) {
	if t.nodes == nil {
		return none, false
	}
	return t.nodes.Get(key)
}

func (t *tree[V]) len() int {
	if t.nodes == nil {
		return 0
	}
	return t.nodes.Len()
}

func (t *tree[V]) scan(yield func(string, V) bool) {
	if t.nodes != nil {
		t.nodes.Scan(yield)
	}
}

func (t *tree[V]) ascend(from string, yield func(string, V) bool) {
	if t.nodes != nil {
		t.nodes.Ascend(from, yield)
	}
}

func (t *tree[V]) set(key string, v V) {
	t.own()
	t.nodes.Set(key, v)
}

func (t *tree[V]) remove(key string) {
	if t.nodes != nil {
		t.own()
		t.nodes.Delete(key)
	}
}

// own makes the nodes ours to change. Map.Copy writes to its receiver, so it gets a copy
// of the head: the original may be read, and copied, by other goroutines at this moment.
func (t *tree[V]) own() {
	switch {
	case t.owned:
		return
	case t.nodes == nil:
		t.nodes = new(btree.Map[string, V])
	default:
		head := *t.nodes
		t.nodes = head.Copy()
	}
	t.owned = true
}
