package node

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/skep-dev/skep/core/model"
)

// apiCerts are the certificates of the API's tcp hosts. They are read again on a reload,
// for connections made from then on.
type apiCerts struct {
	cfg     *Config
	current atomic.Pointer[tls.Config] // nil while no tcp host is served
}

// reload reads the files again if they are in use.
func (a *apiCerts) reload() error {
	if a.current.Load() == nil {
		return nil
	}
	return a.read()
}

// read reads the files. Without a CA that the clients' certificates must come from, nobody
// is a safe audience, so one is demanded.
func (a *apiCerts) read() error {
	cfg := a.cfg
	if cfg.TLSCert == "" || cfg.TLSKey == "" || cfg.TLSCACert == "" {
		return model.Errorf(model.Invalid, "tcp hosts need --tlscert, --tlskey and --tlscacert: whoever reaches the API is root on this machine")
	}
	pair, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
	if err != nil {
		return fmt.Errorf("read certificate of the API: %w", err)
	}
	ca, err := os.ReadFile(cfg.TLSCACert)
	if err != nil {
		return fmt.Errorf("read CA of the API's clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return model.Errorf(model.Invalid, "%s holds no certificate", cfg.TLSCACert)
	}
	a.current.Store(&tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair},
		ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"http/1.1"},
	})
	return nil
}

// server returns a configuration that follows the current one.
func (a *apiCerts) server() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return a.current.Load(), nil },
	}
}
