package alloc

// pool hands out numbers: host parts of a subnet, subnets of a larger prefix, network
// identifiers, ports. Numbers come serially; one that was given back rests until all
// others were given, and then the one that rested longest is next.
//
// Each number from lo to hi is held, resting, or fresh: not yet looked at.
type pool struct {
	// key is what Released says when a number comes back.
	key string
	// lo and hi bound what take gives out; hold accepts any number.
	lo, hi uint64
	// next is the first fresh number, fresh how many there are, wrapping from hi to lo.
	next, fresh uint64
	// held counts the holders of a number. Two only meet in a store that others wrote.
	held map[uint64]uint32
	// resting maps a number to its place in queue. Places whose number has gone
	// elsewhere are skipped.
	resting map[uint64]uint64
	queue   []rested
	places  uint64
}

type rested struct{ value, place uint64 }

func newPool(key string, lo, hi uint64) *pool {
	p := &pool{key: key, lo: lo, hi: hi, next: lo, held: make(map[uint64]uint32), resting: make(map[uint64]uint64)}
	if hi >= lo {
		p.fresh = hi - lo + 1
	}
	return p
}

// hold adds a holder of a number.
func (p *pool) hold(v uint64) {
	p.held[v]++
	delete(p.resting, v)
}

// drop takes a holder away and reports whether the number is free now.
func (p *pool) drop(v uint64) bool {
	if p.held[v] > 1 {
		p.held[v]--
		return false
	}
	delete(p.held, v)
	p.rest(v)
	return true
}

// rest puts a free number last in the queue.
func (p *pool) rest(v uint64) {
	if v < p.lo || v > p.hi || p.held[v] > 0 {
		return
	}
	p.places++
	p.resting[v] = p.places
	p.queue = append(p.queue, rested{v, p.places})
	if len(p.queue) > 2*len(p.resting)+64 {
		kept := make([]rested, 0, len(p.resting))
		for _, r := range p.queue {
			if p.resting[r.value] == r.place {
				kept = append(kept, r)
			}
		}
		p.queue = kept
	}
}

// begin makes v the number after the last that was given, as far as that is known.
func (p *pool) begin(v uint64) {
	if v < p.lo || v >= p.hi {
		v = p.lo
	} else {
		v++
	}
	p.next = v
}

// take returns the next free number that ok accepts, and holds it. Nil accepts all.
func (p *pool) take(ok func(uint64) bool) (uint64, bool) {
	for p.fresh > 0 {
		v := p.next
		p.fresh--
		if p.next++; v == p.hi {
			p.next = p.lo
		}
		if _, resting := p.resting[v]; resting || p.held[v] > 0 {
			continue
		}
		if ok != nil && !ok(v) {
			p.rest(v)
			continue
		}
		p.hold(v)
		return v, true
	}
	for range len(p.queue) {
		r := p.queue[0]
		p.queue = p.queue[1:]
		if p.resting[r.value] != r.place {
			continue
		}
		if ok != nil && !ok(r.value) {
			p.queue = append(p.queue, r)
			continue
		}
		p.hold(r.value)
		return r.value, true
	}
	return 0, false
}

// back undoes the latest takes that were not undone, in reverse order: the number was
// never used, so it is the next again.
func (p *pool) back(v uint64) {
	if p.held[v] > 1 {
		p.held[v]--
		return
	}
	delete(p.held, v)
	before := p.next - 1
	if p.next == p.lo {
		before = p.hi
	}
	if before == v && p.fresh <= p.hi-p.lo {
		p.next = v
		p.fresh++
		return
	}
	p.places++
	p.resting[v] = p.places
	p.queue = append([]rested{{v, p.places}}, p.queue...)
}
