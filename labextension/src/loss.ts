/** How a front end learns that the kernel, or the widget's model in it, is gone, or is heard again. */

/** What we use of anywidget's model. */
export interface Model {
  get(name: string): unknown
  send(content: unknown): void
  on(event: string, callback: (...values: unknown[]) => void): void
  off(event: string, callback: (...values: unknown[]) => void): void
  widget_manager?: unknown
}

interface Signal {
  connect(slot: (sender: unknown, status: string) => void): void
  disconnect(slot: (sender: unknown, status: string) => void): void
}

interface Kernel {
  statusChanged?: Signal
  connectionStatusChanged?: Signal
}

const ENDS = ['restarting', 'autorestarting', 'terminating', 'dead']
const COMM_ENDS = ['comm:close', 'destroy']

/**
 * Call `lose` when the model is gone, and `reconnect` when messages come again after the connection to the
 * kernel was lost; returns what ends the watch.
 *
 * Every host closes the comm of a widget that Python closes. Jupyter's front ends also let us watch the
 * kernel, which cannot close anything when it dies.
 */
export function watchKernel(model: Model, lose: () => void, reconnect: () => void): () => void {
  let isConnected = true
  const status = (_: unknown, now: string) => {
    if (ENDS.includes(now)) lose()
  }
  const connection = (_: unknown, now: string) => {
    const wasConnected = isConnected
    isConnected = now === 'connected'
    if (isConnected && !wasConnected) reconnect()
  }
  const { statusChanged, connectionStatusChanged } = kernelOf(model)
  statusChanged?.connect(status)
  connectionStatusChanged?.connect(connection)
  for (const event of COMM_ENDS) model.on(event, lose)
  return () => {
    statusChanged?.disconnect(status)
    connectionStatusChanged?.disconnect(connection)
    for (const event of COMM_ENDS) model.off(event, lose)
  }
}

function kernelOf(model: Model): Kernel {
  const manager = model.widget_manager as { kernel?: Kernel | null } | undefined
  return manager?.kernel ?? {}
}
