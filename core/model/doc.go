// Package model holds what every layer speaks: error kinds, object identity, the
// task state table, changes and plans. The stored records themselves are the
// generated messages of package api; a record that is stored is never changed.
//
// The package has no state and nothing in it blocks; everything may be used from
// any goroutine.
package model
