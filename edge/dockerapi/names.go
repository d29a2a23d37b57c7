package dockerapi

import (
	"math/rand/v2"
	"strings"
)

// The parts of names for services that were given none. Docker's form is kept,
// "adjective_surname"; these are people who studied bees and swarms.
const (
	adjectives = "amber apt balmy blithe brave bright brisk busy calm candid clear clever cosy daring deft eager early earnest fair fleet fond free gentle glad golden hale happy hardy honest humble jolly keen kind lively loyal lucky mellow merry mild modest neat nimble noble patient placid plucky proud quick quiet ready rustic serene sharp shy silent spry steady sunny swift tidy tranquil trusty upbeat vivid warm wise witty zesty"
	surnames   = "aristaeus aristotle beekman butler camazine columella crane dadant deborah dzierzon frisch gould grozinger huber hutchings huish janscha jarvis karl laidlaw langstroth lindauer lubbock maeterlinck maurizio nolan oertel page palladius pliny quinby reaumur ribbands robinson root rothschild schirach seeley sladen snodgrass swammerdam tautz theraulaz thorley varro virgil warder wenner wheler wildman wilson winston"
)

// randomName returns a name for a service, one of some 3,000.
func randomName() string {
	a, s := strings.Fields(adjectives), strings.Fields(surnames)
	return a[rand.IntN(len(a))] + "_" + s[rand.IntN(len(s))]
}
