package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

// A TCP question is a length (4 bytes, big-endian) and as many bytes; the answer is the same, then the
// server's name as a line.
func serve() error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	failed := make(chan error, 3)
	go func() { failed <- serveTCP(name) }()
	go func() { failed <- serveUDP() }()
	go func() {
		failed <- http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s %s\n", name, r.RemoteAddr)
		}))
	}()
	return <-failed
}

func serveTCP(name string) error {
	listener, err := net.Listen("tcp", ":7000")
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			var size uint32
			if binary.Read(conn, binary.BigEndian, &size) != nil {
				return
			}
			if _, err := io.CopyN(conn, conn, int64(size)); err == nil {
				fmt.Fprintln(conn, name)
			}
		}()
	}
}

func serveUDP() error {
	conn, err := net.ListenPacket("udp", ":7000")
	if err != nil {
		return err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		// A datagram that cannot be answered is a lost one to the client, which counts it.
		_, _ = conn.WriteTo(buffer[:n], from)
	}
}
