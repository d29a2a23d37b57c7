// Package httpapi is the HTTP side of the Docker Engine API: routes with and without
// a version in front, the headers of every answer, version negotiation, JSON in and
// out, errors, query parameters, filters, and streams that take the connection over.
//
// It knows nothing of what is behind an endpoint. A Router is filled with Handle and
// then serves; after the first request it must not be changed. Everything else may
// be used from any goroutine.
package httpapi
