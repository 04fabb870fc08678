// Command probe is the other end of the cluster tests: it answers over TCP, UDP and HTTP with what it
// was sent and who it is, and it asks.
//
//	probe serve                      TCP and UDP echo on 7000, HTTP on 8080, both families
//	probe tcp|udp ADDRESS:PORT SIZE  sends SIZE random bytes, wants them back; prints the server's name
//	probe get URL                    prints the body
//	probe flow ADDRESS:PORT PPS SECONDS
//	                                 numbered datagrams at a steady rate; prints "sent N lost N duplicated N"
//
// Exit code 1 says that the answer was wrong or did not come, 2 that the call was wrong.
package main

import (
	"fmt"
	"os"
	"strconv"
	"time"
)

// How long one question may take before it counts as unanswered.
const patience = 5 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve()
	case len(args) == 3 && (args[0] == "tcp" || args[0] == "udp"):
		size, err := strconv.Atoi(args[2])
		if err != nil || size < 1 || size > 1<<24 {
			usage()
		}
		return echo(args[0], args[1], size)
	case len(args) == 2 && args[0] == "get":
		return get(args[1])
	case len(args) == 4 && args[0] == "flow":
		rate, err1 := strconv.Atoi(args[2])
		seconds, err2 := strconv.Atoi(args[3])
		if err1 != nil || err2 != nil || rate < 1 || rate > 10_000 || seconds < 1 {
			usage()
		}
		return flow(args[1], rate, time.Duration(seconds)*time.Second)
	}
	usage()
	return nil
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: probe serve | tcp|udp ADDRESS:PORT SIZE | get URL | flow ADDRESS:PORT PPS SECONDS")
	os.Exit(2)
}
