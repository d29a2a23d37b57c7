// Package unlock asks others for the key of a locked manager: a command or a service behind
// a Unix socket, which keep it in a KMS, a TPM or wherever they like. It owns no state; its
// functions may be called from any goroutine. Who may ask, and what to do with the key, is
// decided elsewhere.
package unlock
