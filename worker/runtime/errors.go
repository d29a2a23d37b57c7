package runtime

import "errors"

// ErrNotModified says that a container was in the wanted state already.
var ErrNotModified = errors.New("not modified")
