/** How a front end learns that the kernel, or the widget's model in it, is gone. */

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

const ENDS = ['restarting', 'autorestarting', 'terminating', 'dead']
const COMM_ENDS = ['comm:close', 'destroy']

/**
 * Call `lose` once when the model is gone; returns what ends the watch.
 *
 * Every host closes the comm of a widget that Python closes. Jupyter's front ends also let us watch the
 * kernel, which cannot close anything when it dies.
 */
export function watchForLoss(model: Model, lose: () => void): () => void {
  const status = (_: unknown, now: string) => {
    if (ENDS.includes(now)) lose()
  }
  const signal = kernelSignal(model)
  signal?.connect(status)
  for (const event of COMM_ENDS) model.on(event, lose)
  return () => {
    signal?.disconnect(status)
    for (const event of COMM_ENDS) model.off(event, lose)
  }
}

function kernelSignal(model: Model): Signal | undefined {
  const manager = model.widget_manager as { kernel?: { statusChanged?: Signal } | null } | undefined
  return manager?.kernel?.statusChanged
}
