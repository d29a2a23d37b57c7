// Package wireguard runs and programs WireGuard devices: the kernel's where it has them,
// else one in a process of its own that outlives the daemon. A device lives in the network
// namespace of one encrypted network; its UDP socket is in the host's.
//
// A Device is read from and written to whatever runs it, so nothing here remembers what a
// device has; the caller compares and mends. Methods may be called from any goroutine, one
// at a time for each device. Which peers and addresses there are is the caller's business.
package wireguard
