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
// is a safe audience, so one is demanded unless the configuration says that anybody may call.
func (a *apiCerts) read() error {
	cfg := a.cfg
	switch {
	case cfg.TLSCert == "" || cfg.TLSKey == "":
		return model.Errorf(model.Invalid, "tcp hosts need --tlscert, --tlskey and --tlscacert: whoever reaches the API is root on this machine")
	case cfg.TLSCACert == "" && !cfg.AnyClient:
		return model.Errorf(model.Invalid, "tcp hosts need --tlscacert, or --tlsverify=false to let anybody call: whoever reaches the API is root on this machine")
	}
	pair, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
	if err != nil {
		return fmt.Errorf("read certificate of the API: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	if cfg.AnyClient {
		a.current.Store(config)
		return nil
	}
	ca, err := os.ReadFile(cfg.TLSCACert)
	if err != nil {
		return fmt.Errorf("read CA of the API's clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return model.Errorf(model.Invalid, "%s holds no certificate", cfg.TLSCACert)
	}
	config.ClientCAs, config.ClientAuth = pool, tls.RequireAndVerifyClientCert
	a.current.Store(config)
	return nil
}

// server returns a configuration that follows the current one.
func (a *apiCerts) server() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return a.current.Load(), nil },
	}
}
