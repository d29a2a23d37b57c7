// Package convert turns the Docker API's swarm types into stored records and back.
// Store… functions make what is stored, with Docker's defaults and its errors for
// values it does not know; Docker… functions make what clients read. What a client
// stores it reads back: nil and empty, units and enums keep their meaning.
//
// Everything is a function of its arguments; results share no memory that anybody may
// change. What is allowed in a swarm beyond well-formedness is control/ops' to say.
package convert
