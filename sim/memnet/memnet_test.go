package memnet

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// pair connects two hosts.
func pair(t *testing.T, n *Network) (client, server net.Conn) {
	t.Helper()
	l, err := n.Host("10.0.0.2").Listen(t.Context(), "10.0.0.2:1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = n.Host("10.0.0.1").Dial(t.Context(), "10.0.0.2:1"); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func bubble(t *testing.T, test func(*testing.T, *Network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, New(rand.New(rand.NewPCG(1, 2)))) })
}

func TestDelayAndOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		n.SetDelay(10*time.Millisecond, 200*time.Millisecond)
		n.SetLoss(0.3)
		client, server := pair(t, n)
		var want, got string
		go func() {
			for i := range 100 {
				client.Write([]byte{byte('a' + i%26)})
			}
			client.Close()
		}()
		for i := range 100 {
			want += string(rune('a' + i%26))
		}
		began := time.Now()
		data, err := io.ReadAll(server)
		if got = string(data); err != nil || got != want {
			t.Errorf("read %q, %v, want %q", got, err, want)
		}
		if took := time.Since(began); took < 200*time.Millisecond {
			t.Errorf("took %v, want a lost chunk's time at least", took)
		}
	})
}

func TestCutHoldsBack(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		client, server := pair(t, n)
		n.Cut("10.0.0.1", "10.0.0.2")
		if _, err := client.Write([]byte("late")); err != nil {
			t.Fatal(err)
		}
		server.SetReadDeadline(time.Now().Add(time.Hour))
		buf := make([]byte, 8)
		if _, err := server.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read through a cut: %v", err)
		}
		server.Write([]byte("back")) // the other direction is open
		if k, err := client.Read(buf); err != nil || string(buf[:k]) != "back" {
			t.Errorf("read %q, %v", buf[:k], err)
		}
		server.SetReadDeadline(time.Time{})
		time.AfterFunc(time.Minute, n.Heal)
		if k, err := server.Read(buf); err != nil || string(buf[:k]) != "late" {
			t.Errorf("after healing read %q, %v", buf[:k], err)
		}
	})
}

func TestDialIntoACutHangs(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		l, _ := n.Host("10.0.0.2").Listen(t.Context(), "10.0.0.2:1")
		defer l.Close()
		n.Cut("10.0.0.2", "10.0.0.1") // answers do not come back
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := n.Host("10.0.0.1").Dial(ctx, "10.0.0.2:1"); err == nil || time.Since(began) != 5*time.Second {
			t.Errorf("dial: %v after %v", err, time.Since(began))
		}
	})
}

func TestDownResetsAndRefuses(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		client, _ := pair(t, n)
		l, _ := n.Host("10.0.0.2").Listen(t.Context(), "10.0.0.2:2")
		n.SetDown("10.0.0.2", true)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept: %v", err)
		}
		if _, err := n.Host("10.0.0.1").Dial(t.Context(), "10.0.0.2:2"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
		n.SetDown("10.0.0.2", false)
		if _, err := n.Host("10.0.0.2").Listen(t.Context(), "10.0.0.2:2"); err != nil {
			t.Errorf("listen again: %v", err)
		}
	})
}

func TestWindowBlocksTheWriter(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		client, server := pair(t, n)
		client.SetWriteDeadline(time.Now().Add(time.Second))
		var err error
		for err == nil {
			_, err = client.Write(make([]byte, 32<<10))
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v", err)
		}
		client.Close()
		if data, err := io.ReadAll(server); err != nil || len(data) < window {
			t.Errorf("read %d bytes, %v", len(data), err)
		}
		if _, err := client.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
		if _, err := server.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write to a closed reader: %v", err)
		}
	})
}

// A closed end broke the writer at once and the reader only once a cut healed: gRPC tried
// to write without a pause, and the bubble's time stood still.
func TestCloseIsHeardByReaderAndWriter(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		client, server := pair(t, n)
		n.Cut("10.0.0.2", "10.0.0.1")
		if _, err := server.Write([]byte("last")); err != nil {
			t.Fatal(err)
		}
		server.Close()
		for range 2 * window / 1024 { // more than fits: it goes nowhere, and waits for nothing
			if _, err := client.Write(make([]byte, 1024)); err != nil {
				t.Fatalf("a write behind a cut heard of the other end: %v", err)
			}
		}
		n.Heal()
		if _, err := client.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write to a closed reader: %v", err)
		}
		n.Cut("10.0.0.2", "10.0.0.1")
		buf := make([]byte, 8)
		if k, err := client.Read(buf); err != nil || string(buf[:k]) != "last" {
			t.Errorf("read %q, %v", buf[:k], err)
		}
		if _, err := client.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after a failed write: %v", err)
		}
	})
}
