// Command worker sends the probes of one pod, as cyclonus' own worker does, but all at once: what is denied takes its
// time to fail, and the original waits for it in groups of ten.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/mattfenwick/cyclonus/pkg/worker"
)

// More than the probes of any pod in one step.
const concurrency = 64

func main() {
	jobs := flag.String("jobs", "", "what to probe, as JSON")
	flag.Parse()
	results, err := worker.RunWorker(*jobs, concurrency)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(results)
}
