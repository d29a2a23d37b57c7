package model

// The largest data that a secret and a config may have, in bytes.
const (
	MaxSecret = 500*1024 - 1
	MaxConfig = 1000*1024 - 1
)

// TaskSecretID is the id of the value that a secret driver gave for one task alone.
func TaskSecretID(secretID, taskID string) string { return secretID + "." + taskID }
