/**
 * The module that anywidget loads.
 *
 * The hub of a kernel has no view of its own: `initialize` runs when its model is made, and puts live views
 * over the static HTML of the notebook's outputs. A widget of one view alone (`llm.view("map")`) goes
 * through `render`, in any host of the anywidget front-end module standard.
 */

import { Hub } from './hub'
import { pageLanguage, translator } from './i18n'
import { makeHost } from './mount'
import { showState } from './views'
import type { Command, Event, State } from './wire'

/** What we use of anywidget's model. */
interface Model {
  get(name: string): unknown
  send(content: unknown): void
  on(event: string, callback: (...values: unknown[]) => void): void
  off(event: string, callback: (...values: unknown[]) => void): void
}

interface InitializeProps {
  model: Model
}

interface RenderProps extends InitializeProps {
  el: HTMLElement
}

// Jupyter's widgets say by these that the kernel, or the model in it, is gone.
const LOSSES = ['destroy', 'comm:close', 'comm_live_update']

function isAlive(model: Model): boolean {
  return (model as unknown as { comm_live?: boolean }).comm_live !== false
}

function initialize({ model }: InitializeProps): (() => void) | undefined {
  const key = String(model.get('key') ?? '')
  if (!key) return undefined
  const hub = new Hub(key, command => model.send(command))
  const receive = (content: unknown) => hub.receive(content as Event)
  const watch = () => {
    if (!isAlive(model)) hub.lose()
  }
  model.on('msg:custom', receive)
  for (const event of LOSSES) model.on(event, event === 'comm_live_update' ? watch : () => hub.lose())
  hub.greet()
  return () => {
    model.off('msg:custom', receive)
    hub.lose()
  }
}

function render({ model, el }: RenderProps): () => void {
  const state = model.get('state') as State
  const view = String(model.get('view'))
  const language = pageLanguage()
  const t = translator(language)
  const { host, root } = makeHost()
  root.lang = language
  el.append(host)
  const send = (command: Command) => model.send(command)
  const shown = showState(state, { root, view, language, t, send })
  const receive = (content: unknown) => {
    const event = content as Event
    if (event.type === 'state') shown.update(event.state)
    else shown.event(event)
  }
  const lose = () => shown.lost(t('lostKernel'))
  model.on('msg:custom', receive)
  for (const event of LOSSES) model.on(event, lose)
  send({ type: 'hello', view })
  return () => {
    model.off('msg:custom', receive)
    for (const event of LOSSES) model.off(event, lose)
    shown.cleanup()
  }
}

export default { initialize, render }
