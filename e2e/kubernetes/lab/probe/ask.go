package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func echo(network, address string, size int) error {
	conn, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	message := make([]byte, size)
	if _, err := rand.Read(message); err != nil {
		return err
	}
	if network == "udp" {
		return echoDatagram(conn, message)
	}
	sent := make(chan error, 1)
	go func() {
		if err := binary.Write(conn, binary.BigEndian, uint32(size)); err != nil {
			sent <- err
			return
		}
		_, err := conn.Write(message)
		sent <- err
	}()
	answer := make([]byte, size)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return fmt.Errorf("%s does not answer: %w", address, err)
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(answer, message) {
		return fmt.Errorf("%s answered with other bytes than it was sent", address)
	}
	_, err = io.Copy(os.Stdout, conn)
	return err
}

func echoDatagram(conn net.Conn, message []byte) error {
	if _, err := conn.Write(message); err != nil {
		return err
	}
	answer := make([]byte, 1<<16)
	n, err := conn.Read(answer)
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	if !bytes.Equal(answer[:n], message) {
		return fmt.Errorf("answered with other bytes than were sent (%d of %d)", n, len(message))
	}
	return nil
}

func get(url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(os.Stdout, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}

// Sends numbered datagrams and counts the numbers that come back. An answer may be late by `patience`.
func flow(address string, rate int, duration time.Duration) error {
	conn, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	total := uint64(rate) * uint64(duration/time.Second)
	seen := make([]uint8, total)
	done := make(chan struct{})
	var complete uint64
	go func() {
		defer close(done)
		buffer := make([]byte, 64)
		for complete < total {
			n, err := conn.Read(buffer)
			if err != nil {
				if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
					return
				}
				continue // an ICMP error: the datagram it speaks of counts as lost
			}
			if n != 8 {
				continue
			}
			number := binary.BigEndian.Uint64(buffer)
			if number < total && seen[number] < 255 {
				if seen[number]++; seen[number] == 1 {
					complete++
				}
			}
		}
	}()
	start := time.Now()
	interval := time.Second / time.Duration(rate)
	var datagram [8]byte
	for number := range total {
		time.Sleep(time.Until(start.Add(time.Duration(number) * interval)))
		binary.BigEndian.PutUint64(datagram[:], number)
		_, _ = conn.Write(datagram[:]) // refused by the stack: lost, and counted as such
	}
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	<-done
	var lost, duplicated uint64
	for _, times := range seen {
		switch {
		case times == 0:
			lost++
		case times > 1:
			duplicated++
		}
	}
	fmt.Printf("sent %d lost %d duplicated %d\n", total, lost, duplicated)
	return nil
}
