//go:build tools

// Package tools pins wireguard-go, the reference userspace implementation that the engine must talk to.
package tools

import _ "golang.zx2c4.com/wireguard"
