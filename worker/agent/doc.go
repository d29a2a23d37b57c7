// Package agent runs on every node: it keeps a session with a manager, holds the tasks
// that the node was given in a database, and steps each through its life with a container
// runtime.
//
// One loop owns each task; the session and the tasks meet only in the worker, which guards
// its maps by a mutex. Tasks go on without a manager and outlive the process: a restarted
// agent finds their containers by label. What to do next with a task is core/lifecycle's.
package agent
